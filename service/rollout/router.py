"""The versions of one model at work, and which of them answers whom."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from model.errors import InputError, ModelNotFound, NotReady, QueueFull
from service.inference.loaded_model import LoadedModel
from service.inference.pipeline import Pipeline
from service.requests import RequestContext
from service.rollout.shadow import ShadowRunner
from service.telemetry.version_stats import VersionStats

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ask = Callable[[Pipeline, RequestContext], Awaitable[T]]
"""Has a version answer a request, until the claim's deadline."""

_FALLBACK_RESERVE_S = 10.0
"""Of a request's time, what the first version leaves to the second, if it then still has as much."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who answers one request."""

    pipeline: Pipeline
    spare: Pipeline | None
    """Who answers where the other fails."""
    claim: RequestContext

    def is_final(self, pipeline: Pipeline) -> bool:
        """Whether nobody is asked after this version."""
        return self.spare is None or pipeline is self.spare

    async def answer(self, ask: Ask[T]) -> T:
        """What the version answers; where it fails, what the spare one does, and the failure counts against the first.

        A failure of both is the request's: then the first error is raised.
        """
        if self.spare is None:
            return await ask(self.pipeline, self.claim)
        left_s = self.claim.deadline - asyncio.get_running_loop().time()
        spared_s = _FALLBACK_RESERVE_S if left_s >= 2 * _FALLBACK_RESERVE_S else 0.0
        try:
            return await ask(self.pipeline, replace(self.claim, deadline=self.claim.deadline - spared_s))
        except InputError:
            raise
        except Exception as error:  # whatever it was, callers do not feel it while there is another version
            return await self._recover(ask, self.spare, error)

    async def _recover(self, ask: Ask[T], spare: Pipeline, error: Exception) -> T:
        contract = self.pipeline.contract
        logger.warning("%s %s failed, %s answers: %r", contract.name, contract.version, spare.contract.version, error)
        try:
            with spare.admit(self.claim):
                answer = await ask(spare, self.claim)
        except Exception as second:
            raise error from second
        if not isinstance(error, QueueFull):
            self.pipeline.track.fail()
        return answer


class TrafficRouter:
    """Says for each request which version answers it; who leads it puts versions into their roles.

    To be used on the event loop alone, so that a change falls between two requests.
    """

    def __init__(self, active: LoadedModel | None = None) -> None:
        self.active = active
        """What answers, but for the canary's share."""
        self.canary: LoadedModel | None = None
        self.canary_share = 0.0
        """Of the callers, those whom the canary answers."""
        self.spare: LoadedModel | None = None
        """What was active before, still warm: it answers where the active version fails."""
        self.shadow: ShadowRunner | None = None
        """What answers some of the pictures, too, and nobody hears of it."""
        self.obstacle = "no version is active"
        """Why nothing answers, while nothing is active."""

    @property
    def tally(self) -> VersionStats | None:
        """What the active version did, if one is open."""
        pipeline = self.active.pipeline if self.active else None
        return pipeline.tally if pipeline else None

    def require(self) -> Pipeline:
        """The active version at work. Raises NotReady, with the reason, while there is none."""
        if not self.active:
            raise NotReady(self.obstacle)
        return self.active.require()

    def list_deployments(self) -> list[LoadedModel]:
        """All versions that are open, the active one first."""
        return [each for each in (self.active, self.canary, self.spare) if each]

    def list_pipelines(self) -> list[Pipeline]:
        """Those that answer, or could, the active one first."""
        return [pipeline for each in self.list_deployments() if (pipeline := each.find())]

    def list_versions(self) -> list[str]:
        """Their versions."""
        return [each.contract.version for each in self.list_pipelines()]

    def find_version(self, version: str) -> Pipeline:
        """A version that answers, or could. Raises ModelNotFound."""
        for each in self.list_pipelines():
            if each.contract.version == version:
                return each
        raise ModelNotFound(
            f"no model of version {version!r}: there is {', '.join(self.list_versions()) or 'none yet'}"
        )

    def mirror(self, pictures: Iterable[bytes]) -> None:
        """Show pictures that were answered to the shadow, if there is one."""
        if self.shadow:
            self.shadow.offer(pictures)

    @contextmanager
    def admit(self, claim: RequestContext, routing_key: str) -> Iterator[Route]:
        """A place for one request, its body not yet read, with the version that is to answer it.

        One key is always answered by the same version, as long as that can. Raises Busy, and NotReady.
        """
        choices = self._list_choices(routing_key)
        with ExitStack() as stack:
            for place, pipeline in enumerate(choices):
                try:
                    stack.enter_context(pipeline.admit(claim))
                except (QueueFull, NotReady):
                    if place == len(choices) - 1:
                        raise
                else:
                    spare = choices[place + 1] if place + 1 < len(choices) else None
                    yield Route(pipeline=pipeline, spare=spare, claim=claim)
                    return

    def _list_choices(self, routing_key: str) -> Sequence[Pipeline]:
        """Who might answer, the first choice first. Raises NotReady if nobody does."""
        canary = self.canary.find() if self.canary else None
        if canary and not is_in_canary(routing_key, canary, self.canary_share):
            canary = None
        others = [each.find() for each in (self.active, self.spare) if each]
        return [each for each in (canary, *others) if each] or [self.require()]


def is_in_canary(routing_key: str, pipeline: Pipeline, share: float) -> bool:
    """Whether a caller is among the canary's; the choice is each canary's own, so that it does not fall on the same."""
    text = f"{pipeline.contract.name}\n{pipeline.contract.version}\n{routing_key}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
