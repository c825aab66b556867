"""Routes a request to a model, and there to the active or canary version; copies images to the shadow version."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from model.errors import InputError, InvalidParameter, ModelNotFound, NotReady, QueueFull
from service.inference.pipeline import ImageContent, Pipeline
from service.metrics import VersionStats
from service.requests import RequestContext
from service.rollout.canary_analysis import ShadowRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")
Call = Callable[[Pipeline, RequestContext], Awaitable[T]]
"""Handles a request on one version, until the context's deadline."""

_FALLBACK_RESERVE_S = 10.0
"""Part of the timeout that is kept for the fallback version, if as much is left for the first."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """The version that handles one request, and the one that does if it fails."""

    pipeline: Pipeline
    fallback: Pipeline | None
    context: RequestContext

    def is_final(self, pipeline: Pipeline) -> bool:
        """Whether no other version is tried after this one."""
        return self.fallback is None or pipeline is self.fallback

    async def run(self, call: Call[T]) -> T:
        """Return the result of `call` on the version, or on the fallback if the version fails.

        If both fail, the request is at fault, and the first error is raised.
        """
        if self.fallback is None:
            return await call(self.pipeline, self.context)
        time_left_s = self.context.deadline - asyncio.get_running_loop().time()
        reserve_s = _FALLBACK_RESERVE_S if time_left_s >= 2 * _FALLBACK_RESERVE_S else 0.0
        try:
            return await call(self.pipeline, replace(self.context, deadline=self.context.deadline - reserve_s))
        except InputError:
            raise
        except Exception as error:  # of any kind: clients do not notice it while there is another version
            return await self._run_fallback(call, self.fallback, error)

    async def _run_fallback(self, call: Call[T], fallback: Pipeline, error: Exception) -> T:
        failed, contract = self.pipeline.contract, fallback.contract
        logger.warning("%s %s failed, falling back to %s: %r", failed.name, failed.version, contract.version, error)
        try:
            with fallback.scheduler.admit(self.context):
                result = await call(fallback, self.context)
        except Exception as second:
            raise error from second
        if not isinstance(error, QueueFull):
            self.pipeline.stats.record_image(None)
        return result


class TrafficRouter:
    """Selects the version of a model that handles a request; its controller assigns the roles.

    To be used on the event loop only, so that roles change between two requests.
    """

    def __init__(self, active: Pipeline | None = None) -> None:
        self.active = active
        """Handles all requests but the canary's."""
        self.canary: Pipeline | None = None
        self.canary_fraction = 0.0
        """Fraction of the clients that the canary handles."""
        self.fallback: Pipeline | None = None
        """The previously active version, still loaded; used if the active one fails."""
        self.shadow: ShadowRunner | None = None
        self.unready_reason = "no version is active"
        """Why no request is handled, while no version is active."""

    @property
    def stats(self) -> VersionStats | None:
        """Statistics of the active version, if there is one."""
        return self.active.stats if self.active else None

    def get_pipeline(self, version: str | None = None) -> Pipeline:
        """Return a version that is ready, by default the active one.

        Raises NotReady, with the reason, while no version is active, and ModelNotFound for one that is not loaded.
        """
        if not self.active:
            raise NotReady(self.unready_reason)
        if not self.active.scheduler.is_alive:
            raise NotReady("the inference worker died and is being restarted: try again in a moment")
        if version is None:
            return self.active
        loaded = {each.contract.version: each for each in self.list_pipelines()}
        if version not in loaded:
            raise ModelNotFound(f"version {version!r} is not loaded; loaded versions: {', '.join(loaded)}")
        return loaded[version]

    def list_pipelines(self) -> list[Pipeline]:
        """Return the versions that are ready, the active one first."""
        return [each for each in (self.active, self.canary, self.fallback) if each and each.scheduler.is_alive]

    def mirror(self, images: Iterable[ImageContent]) -> None:
        """Copy segmented images to the shadow version, if there is one."""
        if self.shadow:
            self.shadow.submit(images)

    @contextmanager
    def admit(self, context: RequestContext, version: str | None = None) -> Iterator[Route]:
        """Admit one request, whose body has not been read yet, to a version: the given one, or one of our choice.

        Requests with the same routing key get the same version as long as it is ready. Raises QueueFull, and what
        `get_pipeline` raises.
        """
        candidates = [self.get_pipeline(version)] if version else self._list_candidates(context.routing_key)
        with ExitStack() as stack:
            for index, pipeline in enumerate(candidates):
                is_last = index == len(candidates) - 1
                try:
                    stack.enter_context(pipeline.scheduler.admit(context))
                except (QueueFull, NotReady):
                    if is_last:
                        raise
                else:
                    fallback = None if is_last else candidates[index + 1]
                    yield Route(pipeline=pipeline, fallback=fallback, context=context)
                    return

    def _list_candidates(self, routing_key: str) -> Sequence[Pipeline]:
        """Return the versions that can handle a request, the first choice first. Raises NotReady if there is none."""
        canary = find_ready(self.canary)
        if canary and not is_in_canary(routing_key, canary, self.canary_fraction):
            canary = None
        candidates = (canary, find_ready(self.active), find_ready(self.fallback))
        return [each for each in candidates if each] or [self.get_pipeline()]


class Routers:
    """The models of a server."""

    def __init__(self, default_model: str | None, unready_reason: str) -> None:
        self.by_name: dict[str, TrafficRouter] = {}
        self.unready_reason = unready_reason
        """Why no request is handled, while there is no model."""
        self._default_model = default_model

    def get(self, name: str | None = None) -> TrafficRouter:
        """Return the model of a name, by default the only or the default one.

        Raises NotReady if none is loaded yet, ModelNotFound, InvalidParameter if there are several and no default.
        """
        if not self.by_name:
            raise NotReady(self.unready_reason)
        known = ", ".join(sorted(self.by_name))
        requested = self._default_model if name is None else name
        if requested is None and len(self.by_name) > 1:
            raise InvalidParameter(f"several models are served: set model=NAME, one of {known}")
        requested = requested or next(iter(self.by_name))
        if requested not in self.by_name:
            raise ModelNotFound(f"model {requested!r} not found; known models: {known}")
        return self.by_name[requested]


def find_ready(pipeline: Pipeline | None) -> Pipeline | None:
    """Return the pipeline unless its worker is being restarted."""
    return pipeline if pipeline and pipeline.scheduler.is_alive else None


def is_in_canary(routing_key: str, pipeline: Pipeline, fraction: float) -> bool:
    """Return whether a client belongs to the canary; each version hashes differently, so that clients take turns."""
    text = f"{pipeline.contract.name}\n{pipeline.contract.version}\n{routing_key}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64
