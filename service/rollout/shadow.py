"""A version that answers pictures nobody asked it about, when there is time, and whose answers nobody sees."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable

from model.errors import InputError
from service.inference.pipeline import Pipeline
from service.requests import LOWEST_PRIORITY, RequestContext, SegmentOptions
from service.telemetry.metrics import Telemetry
from service.telemetry.stage_timer import StageTimer

logger = logging.getLogger(__name__)

_MAX_WAITING = 4
_MAX_IDLE_WAIT_S = 10.0
"""How long a picture waits for the active version to have nothing to do."""
_PERIOD_S = 0.02
_LIMIT_S = 60.0


class ShadowRunner:
    """Answers a share of the pictures on `pipeline`, one at a time, while `active` has nothing to do."""

    def __init__(self, pipeline: Pipeline, active: Pipeline, share: float, telemetry: Telemetry) -> None:
        self.pipeline = pipeline
        self.active = active
        self.share = share
        self._counter = telemetry.shadow_images
        self._waiting: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None
        self._draw = random.Random().random
        self._unseen = Telemetry()  # or its stages would count among those that callers wait for

    def offer(self, pictures: Iterable[bytes]) -> None:
        """Pictures that were answered; those that are not drawn, or for which there is no room, are left out."""
        for each in pictures:
            if self._draw() >= self.share:
                continue
            if len(self._waiting) >= _MAX_WAITING:
                self._count("dropped")
                continue
            self._waiting.append(each)
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._work())

    def stop(self) -> None:
        """Leave out whatever still waits."""
        self._waiting.clear()
        if self._task:
            self._task.cancel()

    async def settle(self) -> None:
        """Return once nothing waits."""
        if self._task:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while self._waiting:
            picture = self._waiting.popleft()
            if await self._wait_for_rest():
                await self._answer(picture)
            else:
                self._count("dropped")

    async def _answer(self, picture: bytes) -> None:
        claim = RequestContext(deadline=asyncio.get_running_loop().time() + _LIMIT_S, priority=LOWEST_PRIORITY)
        try:
            await self.pipeline.run(picture, SegmentOptions(), lambda _found: None, claim, StageTimer(self._unseen))
        except InputError:
            self._count("ok")  # the active version's answer, too, if it had been asked for the same
        except Exception as error:  # nobody may feel it; the active version did answer
            logger.info("the shadow failed: %r", error)
            self.pipeline.track.fail()
            self._count("failed")
        else:
            self._count("ok")

    async def _wait_for_rest(self) -> bool:
        for _ in range(round(_MAX_IDLE_WAIT_S / _PERIOD_S)):
            if self.active.engine.is_idle:
                return True
            await asyncio.sleep(_PERIOD_S)
        return False

    def _count(self, outcome: str) -> None:
        self._counter.labels(self.pipeline.contract.name, outcome).inc()
