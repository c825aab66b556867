"""Micro-batches: many callers, one network, and no caller pays for another's picture."""

import asyncio
import contextlib
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from model.backends.session import Session
from model.errors import Busy, DeadlinePassed, InferenceError, NotReady
from model.raw import Raw
from service.telemetry import Telemetry

logger = logging.getLogger(__name__)

_FIRST_GUESS_S = 0.5
"""Taken for the length of a run until one was measured."""
_MEMORY = 0.8
"""Weight of the past in the mean length of a run."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A raw answer, and what it took."""

    raw: Raw
    queue_s: float
    """From submission until its run began."""
    infer_s: float
    """Length of the run, shared with the rest of the batch."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]
    deadline: float
    submitted: float
    future: asyncio.Future[Inference] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def finish(self, inference: Inference) -> None:
        if not self.future.done():
            self.future.set_result(inference)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # counts as retrieved, so that asyncio does not complain where the caller is gone


class Engine:
    """A bounded queue in front of a session, which runs on one thread of its own.

    Times are those of the running event loop, in seconds.
    """

    def __init__(
        self, session: Session, telemetry: Telemetry, *, max_batch: int, max_wait_ms: float, capacity: int
    ) -> None:
        self._session = session
        self._telemetry = telemetry
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(capacity)
        self._running: list[_Item] = []
        self._run_s = _FIRST_GUESS_S
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer; to be called on the event loop that will submit."""
        self._loop_task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Take no more, fail whatever still waits with NotReady, and wait for the thread to end."""
        if self._loop_task is None:
            return
        task, self._loop_task = self._loop_task, None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while not self._queue.empty():
            self._running.append(self._queue.get_nowait())
        for item in self._running:
            item.fail(NotReady("the service is shutting down: try again in a moment"))
        self._telemetry.queue_depth.set(0)
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, pixels: UInt8[np.ndarray, "3 H W"], size: tuple[int, int], deadline: float) -> Inference:
        """The network's answer to one picture of that size (height, width) at the top left of its pixels.

        Raises Busy if the queue is full, DeadlinePassed at the deadline, NotReady if the engine does not run, and
        whatever the session raises for this picture. A submission that is cancelled is dropped from the queue.
        """
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            raise NotReady("the service is not running: try again in a moment")
        item = _Item(pixels=pixels, size=size, deadline=deadline, submitted=loop.time())
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull as error:
            raise self.make_busy() from error
        self._telemetry.queue_depth.set(self._queue.qsize())
        try:
            await asyncio.wait({item.future}, timeout=deadline - loop.time())
            if not item.future.done():
                raise _late()
            return item.future.result()
        finally:
            item.future.cancel()

    def make_busy(self) -> Busy:
        """The error for a picture that finds no place: when to come back follows from the depth and recent runs."""
        ahead = self._queue.qsize() + len(self._running)
        runs = math.ceil(ahead / self._max_batch)
        return Busy(
            f"{ahead} pictures are waiting, no more are taken: try again later",
            retry_after_s=max(1, math.ceil(runs * self._run_s)),
        )

    async def _serve(self) -> None:
        """The loop: it ends when cancelled and for nothing else."""
        while True:
            try:
                await self._gather()
                self._telemetry.batch_size.observe(len(self._running))
                await self._answer(self._running)
            except Exception as error:  # a fault of ours must not end the loop, or all later requests would hang
                logger.exception("a batch of %d failed outside its session", len(self._running))
                for item in self._running:
                    item.fail(error)
            self._running = []

    async def _gather(self) -> None:
        """Fill the next batch, until it is full or its first item has waited longest."""
        self._running.append(await self._next())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._max_wait_s):
                while len(self._running) < self._max_batch:
                    self._running.append(await self._next())

    async def _next(self) -> _Item:
        """The next item that somebody still waits for; others are dropped here."""
        while True:
            item = await self._queue.get()
            self._telemetry.queue_depth.set(self._queue.qsize())
            if item.deadline <= asyncio.get_running_loop().time():
                item.fail(_late())
            if not item.future.done():
                return item

    async def _answer(self, batch: list[_Item]) -> None:
        """Answer every item; if the run raises, one by one, so that the culprit fails alone."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            raws = await loop.run_in_executor(self._thread, self._run, batch)
        except Exception as error:  # sessions raise their backend's own exceptions, which share no base
            if len(batch) == 1:
                batch[0].fail(error)
                return
            logger.warning("a batch of %d failed (%s), retrying one by one", len(batch), error)
            for item in batch:
                if not item.future.done():
                    await self._answer([item])
            return
        infer_s = loop.time() - started
        self._run_s = _MEMORY * self._run_s + (1 - _MEMORY) * infer_s
        for item, raw in zip(batch, raws, strict=True):
            if is_finite(raw):
                item.finish(Inference(raw=raw, queue_s=started - item.submitted, infer_s=infer_s))
            else:
                item.fail(InferenceError("the network gave numbers that are not finite"))

    def _run(self, batch: list[_Item]) -> list[Raw]:
        """Answers in order, from one run for each canvas in the batch."""
        answers: dict[int, Raw] = {}
        for shape in {item.pixels.shape for item in batch}:
            places = [place for place, item in enumerate(batch) if item.pixels.shape == shape]
            pixels = np.stack([batch[place].pixels for place in places])
            raws = self._session.run(pixels, np.array([batch[place].size for place in places]))
            if len(raws) != len(places):
                raise InferenceError(f"the session gave {len(raws)} answers to {len(places)} pictures")
            answers |= zip(places, raws, strict=True)
        return [answers[place] for place in range(len(batch))]


def is_finite(raw: Raw) -> bool:
    """Whether every number of the answer is one."""
    return all(bool(np.isfinite(numbers).all()) for numbers in (raw.scores, raw.boxes, raw.masks, raw.semantic))


def _late() -> DeadlinePassed:
    return DeadlinePassed("the picture was not answered within its time limit: send fewer at once, or try again")
