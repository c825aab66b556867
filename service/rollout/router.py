"""Routes requests to the active or canary version of a model, and copies images to its shadow version."""

import asyncio
import hashlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from model.errors import InputError, ModelNotFound, NotReady, QueueFull
from service.inference.loaded_model import LoadedModel
from service.inference.pipeline import ImageContent, Pipeline
from service.requests import LOWEST_PRIORITY, RequestContext, SegmentOptions
from service.telemetry.metrics import Telemetry
from service.telemetry.recorders import StageTimer, VersionStats

logger = logging.getLogger(__name__)

T = TypeVar("T")
Call = Callable[[Pipeline, RequestContext], Awaitable[T]]
"""Handles a request on one version, until the context's deadline."""

_FALLBACK_RESERVE_S = 10.0
"""Part of the timeout that is kept for the fallback version, if as much is left for the first."""
_MAX_SHADOW_IMAGES = 4
_SHADOW_IDLE_WAIT_S = 10.0
_SHADOW_POLL_S = 0.02
_SHADOW_TIMEOUT_S = 60.0


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
            with fallback.admit(self.context):
                result = await call(fallback, self.context)
        except Exception as second:
            raise error from second
        if not isinstance(error, QueueFull):
            self.pipeline.stats.record_failure()
        return result


class ShadowRunner:
    """Re-runs a fraction of the images on another version while the active one is idle, and discards the results."""

    def __init__(self, pipeline: Pipeline, active: Pipeline, traffic_fraction: float, telemetry: Telemetry) -> None:
        self.pipeline = pipeline
        self.active = active
        self.traffic_fraction = traffic_fraction
        self._counter = telemetry.shadow_images
        self._waiting: deque[ImageContent] = deque()
        self._task: asyncio.Task[None] | None = None
        self._random = random.Random()

    def submit(self, images: Iterable[ImageContent]) -> None:
        """Queue a sample of the images; without room in the queue they are dropped."""
        for image in images:
            if self._random.random() >= self.traffic_fraction:
                continue
            if len(self._waiting) < _MAX_SHADOW_IMAGES:
                self._waiting.append(image)
            else:
                self._count("dropped")
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Drop the images that wait."""
        self._waiting.clear()
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        while self._waiting:
            image = self._waiting.popleft()
            self._count(await self._segment(image) if await self._wait_until_active_is_idle() else "dropped")

    async def _segment(self, image: ImageContent) -> str:
        """Segment an image; return its outcome."""
        deadline = asyncio.get_running_loop().time() + _SHADOW_TIMEOUT_S
        context = RequestContext(deadline=deadline, priority=LOWEST_PRIORITY)
        try:
            timer, contract = StageTimer(None), self.pipeline.contract
            await self.pipeline.run(image, SegmentOptions(), lambda _result: None, context, timer, contract)
        except InputError:
            return "ok"  # the same error as the active version's
        except Exception as error:  # of any kind: clients must not notice it
            logger.info("the shadow version failed: %r", error)
            self.pipeline.stats.record_failure()
            return "failed"
        return "ok"

    async def _wait_until_active_is_idle(self) -> bool:
        for _ in range(round(_SHADOW_IDLE_WAIT_S / _SHADOW_POLL_S)):
            if self.active.scheduler.is_idle:
                return True
            await asyncio.sleep(_SHADOW_POLL_S)
        return False

    def _count(self, outcome: str) -> None:
        self._counter.labels(self.pipeline.contract.name, outcome).inc()


class TrafficRouter:
    """Selects the version of a model that handles a request; its controller assigns the roles.

    To be used on the event loop only, so that roles change between two requests.
    """

    def __init__(self, active: LoadedModel | None = None) -> None:
        self.active = active
        """Handles all requests but the canary's."""
        self.canary: LoadedModel | None = None
        self.canary_fraction = 0.0
        """Fraction of the clients that the canary handles."""
        self.fallback: LoadedModel | None = None
        """The previously active version, still loaded; used if the active one fails."""
        self.shadow: ShadowRunner | None = None
        self.unready_reason = "no version is active"
        """Why no request is handled, while no version is active."""

    @property
    def stats(self) -> VersionStats | None:
        """Statistics of the active version, if it is loaded."""
        pipeline = self.active.pipeline if self.active else None
        return pipeline.stats if pipeline else None

    def get_pipeline(self) -> Pipeline:
        """Return the active version. Raises NotReady, with the reason, while there is none."""
        if not self.active:
            raise NotReady(self.unready_reason)
        return self.active.get_pipeline()

    def list_models(self) -> list[LoadedModel]:
        """Return the loaded versions, the active one first."""
        return [each for each in (self.active, self.canary, self.fallback) if each]

    def list_pipelines(self) -> list[Pipeline]:
        """Return those of them that are ready."""
        return [pipeline for each in self.list_models() if (pipeline := each.find_pipeline())]

    def list_versions(self) -> list[str]:
        """Return the names of those versions."""
        return [each.contract.version for each in self.list_pipelines()]

    def find_version(self, version: str) -> Pipeline:
        """Return one of those versions. Raises ModelNotFound."""
        for each in self.list_pipelines():
            if each.contract.version == version:
                return each
        known = ", ".join(self.list_versions()) or "none yet"
        raise ModelNotFound(f"version {version!r} is not loaded; loaded versions: {known}")

    def mirror(self, images: Iterable[ImageContent]) -> None:
        """Copy segmented images to the shadow version, if there is one."""
        if self.shadow:
            self.shadow.submit(images)

    @contextmanager
    def admit(self, context: RequestContext) -> Iterator[Route]:
        """Admit one request, whose body has not been read yet, and choose its version.

        Requests with the same routing key get the same version as long as it is ready. Raises QueueFull and NotReady.
        """
        candidates = self._list_candidates(context.routing_key)
        with ExitStack() as stack:
            for index, pipeline in enumerate(candidates):
                is_last = index == len(candidates) - 1
                try:
                    stack.enter_context(pipeline.admit(context))
                except (QueueFull, NotReady):
                    if is_last:
                        raise
                else:
                    fallback = None if is_last else candidates[index + 1]
                    yield Route(pipeline=pipeline, fallback=fallback, context=context)
                    return

    def _list_candidates(self, routing_key: str) -> Sequence[Pipeline]:
        """Return the versions that can handle a request, the first choice first. Raises NotReady if there is none."""
        canary = self.canary.find_pipeline() if self.canary else None
        if canary and not is_in_canary(routing_key, canary, self.canary_fraction):
            canary = None
        others = [each.find_pipeline() for each in (self.active, self.fallback) if each]
        return [each for each in (canary, *others) if each] or [self.get_pipeline()]


def is_in_canary(routing_key: str, pipeline: Pipeline, fraction: float) -> bool:
    """Return whether a client belongs to the canary; each version hashes differently, so that clients take turns."""
    text = f"{pipeline.contract.name}\n{pipeline.contract.version}\n{routing_key}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64
