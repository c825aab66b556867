"""Micro-batches: many callers, one network, and no caller pays for another's picture."""

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from jaxtyping import UInt8

from model.backends.session import Session
from model.errors import InferenceError, NotReady, QueueFull
from model.network_io import RawOutputs
from service.inference.batch_policy import BatchPolicy, ImageBatch
from service.inference.queue import FairQueue, InferenceResult, QueuedImage, make_deadline_error
from service.inference.worker import InferenceThread, InferenceThreadDied
from service.requests import RequestContext
from service.telemetry.metrics import SharedGauge, Telemetry

logger = logging.getLogger(__name__)

_MAX_WAIT_FRACTION = 0.9
"""Share of a picture's time that waiting and its run may take; the rest is for what comes after."""
_MAX_RETRY_DELAY_S = 30.0
"""Between attempts to make a session again."""
_STOP_TIMEOUT_S = 10.0
"""How long the end waits for a run that has begun."""
_OUT_OF_MEMORY_MESSAGES = ("out of memory", "failed to allocate", "bad_alloc", "bad allocation")
"""What CUDA, ONNX Runtime's arenas and C++ say, in lower case; none of them raises a class of its own."""


class BatchScheduler:
    """A bounded queue in front of a session, which runs on one thread of its own.

    Times are those of the running event loop, in seconds. `reopen` makes the session anew when its thread has died.
    """

    def __init__(
        self,
        session: Session,
        telemetry: Telemetry,
        *,
        max_batch_size: int,
        max_queue_delay_ms: float,
        capacity: int,
        max_batch_pixels: int = 2**31,
        max_queue_wait_s: float = math.inf,
        inference_timeout_s: float = 60.0,
        reopen: Callable[[], Session] | None = None,
    ) -> None:
        self._session = session
        self._telemetry = telemetry
        self._depth = SharedGauge(telemetry.queue_depth)
        self._capacity = capacity
        self._max_queue_s = max_queue_wait_s
        self._stuck_s = inference_timeout_s
        self._reopen = reopen
        self._queue = FairQueue()
        self._batcher = BatchPolicy(
            max_batch_size=max_batch_size, max_wait_s=max_queue_delay_ms / 1000, limit_pixels=max_batch_pixels
        )
        self._running: list[QueuedImage] = []
        self._has_news = asyncio.Event()
        self._worker = InferenceThread()
        self._loop_task: asyncio.Task[None] | None = None
        self.runs = 0
        """Batches that were begun, those of a trial of its speed among them."""
        self.is_alive = True
        """Whether pictures are answered; while the thread of the network is replaced, it is not."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._queue and not self._running

    async def start(self) -> None:
        """Begin to answer; to be called on the event loop that will submit."""
        self._loop_task = asyncio.create_task(self._serve())
        self._loop_task.add_done_callback(self._revive)

    def drain(self) -> None:
        """Wait for no company any more: nobody else will come."""
        self._batcher.is_draining = True
        self._has_news.set()

    async def stop(self) -> None:
        """Take no more, fail whatever still waits with NotReady, and wait for the thread to end."""
        if self._loop_task is None:
            return
        task, self._loop_task = self._loop_task, None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for item in [*self._queue, *self._running]:
            self._queue.discard(item)
            item.fail(NotReady("the service is shutting down: try again in a moment"))
        self._tell_depth()
        await self._worker.stop(_STOP_TIMEOUT_S)

    async def submit(
        self,
        pixels: UInt8[np.ndarray, "3 H W"],
        size: tuple[int, int],
        claim: RequestContext,
        begin: Callable[[], None] = lambda: None,
    ) -> InferenceResult:
        """The network's answer to one picture of that size (height, width) at the top left of its pixels.

        `begin` is called when its run begins.

        Raises Busy as `require_place` does, DeadlineExceeded at the deadline, NotReady
        if the engine does not run, and whatever the session raises for this picture. A submission that is cancelled
        is dropped from the queue.
        """
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            raise NotReady("the service is not running: try again in a moment")
        self.require_place(claim)
        item = QueuedImage(pixels=pixels, size=size, claim=claim, submitted=loop.time(), begin=begin)
        self._queue.put(item)
        self._tell_depth()
        self._has_news.set()
        try:
            await asyncio.wait({item.future}, timeout=claim.deadline - loop.time())
            if not item.future.done():
                raise make_deadline_error()
            return item.future.result()
        finally:
            item.future.cancel()
            self._queue.discard(item)
            self._tell_depth()

    def make_busy(self) -> QueueFull:
        """The error for a picture that finds no place: when to come back follows from the depth and recent runs."""
        ahead = len(self._queue) + len(self._running)
        return QueueFull(
            f"{ahead} pictures are waiting, no more are taken: try again later",
            retry_after_s=max(1, math.ceil(self._batcher.estimate_s(ahead))),
        )

    def require_place(self, claim: RequestContext) -> None:
        """Raise Busy if the queue is full, or so long that a picture would wait for too much of its time."""
        if len(self._queue) >= self._capacity:
            raise self.make_busy()
        ahead = len(self._running) + self._queue.count_ahead(claim)
        left_s = claim.deadline - asyncio.get_running_loop().time()
        if not ahead or not self._batcher.is_measured or left_s <= 0.0:
            return
        # A queue that is longer than callers are patient would be worked off for those who have left.
        is_late = self._batcher.estimate_s(ahead + 1) > _MAX_WAIT_FRACTION * left_s
        if is_late or self._batcher.estimate_s(ahead) > self._max_queue_s:
            raise self.make_busy()

    def _tell_depth(self) -> None:
        self._depth.set(len(self._queue))

    async def _serve(self) -> None:
        """The loop: it ends when cancelled and for nothing else."""
        while True:
            try:
                batch = await self._gather()
                self._running = batch.items
                self.runs += 1
                self._telemetry.observe_batch(batch.input_size, [item.size for item in batch.items], batch.reason)
                for item in batch.items:
                    item.begin()
                await self._answer(batch.items)
            except InferenceThreadDied as error:
                await self._replace_worker(error)
            except Exception as error:  # a fault of ours must not end the loop, or all later requests would hang
                logger.exception("a batch of %d failed outside its session", len(self._running))
                for item in self._running:
                    item.fail(error)
            self._running = []

    def _revive(self, ended: asyncio.Task[None]) -> None:
        """Begin again where the loop ended without having been stopped."""
        if ended is not self._loop_task:
            return
        logger.error("the loop of the engine ended and is started again: %r", ended)
        self._telemetry.worker_restarts.labels("loop").inc()
        for item in self._running:
            item.fail(NotReady("the service lost this picture: try again"))
        self._running = []
        self._loop_task = asyncio.create_task(self._serve())
        self._loop_task.add_done_callback(self._revive)

    async def _gather(self) -> ImageBatch:
        """The next batch, once there is a reason to run it; who is late or gone is dropped here."""
        loop = asyncio.get_running_loop()
        while True:
            self._has_news.clear()
            for item in [item for item in self._queue if item.future.done() or item.claim.deadline <= loop.time()]:
                self._queue.discard(item)
                item.fail(make_deadline_error())
            choice = self._batcher.choose(self._queue, loop.time())
            self._tell_depth()
            if isinstance(choice, ImageBatch):
                return choice
            with suppress(TimeoutError):
                async with asyncio.timeout(choice):
                    await self._has_news.wait()

    async def _answer(self, items: list[QueuedImage]) -> None:
        """Answer every item; if the run raises, in halves, so that the culprit fails alone."""
        items = [item for item in items if not item.future.done()]
        if not items:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            raws = await self._worker.run(lambda: self._run(items), self._stuck_s)
        except InferenceThreadDied:
            raise
        except Exception as error:  # sessions raise their backend's own exceptions, which share no base
            await self._answer_apart(items, error)
            return
        infer_s = loop.time() - started
        self._batcher.learn(items[0].pixels.shape, infer_s)
        for item, raw in zip(items, raws, strict=True):
            if raw is None:
                self._telemetry.inference_failures.inc()
                item.fail(InferenceError("the network gave numbers that are not finite"))
            else:
                item.finish(InferenceResult(raw=raw, queue_s=started - item.submitted, infer_s=infer_s))

    async def _answer_apart(self, items: list[QueuedImage], error: Exception) -> None:
        """Answer what failed together in two halves, or fail it if it is alone."""
        is_short = is_out_of_memory(error)
        if len(items) == 1:
            self._telemetry.inference_failures.inc()
            items[0].fail(self._make_short() if is_short else error)
            return
        if is_short:
            self._batcher.shrink(items[0].pixels.shape, len(items))
        logger.warning("a batch of %d failed (%s), retrying in halves", len(items), type(error).__name__)
        self._telemetry.batch_splits.labels("memory" if is_short else "error").inc()
        middle = (len(items) + 1) // 2
        await self._answer(items[:middle])
        await self._answer(items[middle:])

    def _make_short(self) -> QueueFull:
        return QueueFull("the device is short of memory: try again later", retry_after_s=self.make_busy().retry_after_s)

    def _run(self, items: list[QueuedImage]) -> list[RawOutputs | None]:
        """Answers in order; None for one that holds numbers which are none."""
        raws = self._session.run(np.stack([item.pixels for item in items]), np.array([item.size for item in items]))
        if len(raws) != len(items):
            raise InferenceError(f"the session gave {len(raws)} answers to {len(items)} pictures")
        return [raw if is_finite(raw) else None for raw in raws]

    async def _replace_worker(self, death: InferenceThreadDied) -> None:
        """Take a new thread, and a session made anew on it; until then nothing is answered."""
        logger.error("the network is started again: %s", death)
        self.is_alive = False
        self._telemetry.worker_restarts.labels("worker").inc()
        alone = len(self._running) == 1
        for item in self._running:
            item.fail(death if alone else NotReady("the network died with this picture in it: try again"))
        self._running = []
        pause_s = 1.0
        while not self.is_alive:
            self._worker.abandon()
            self._worker = InferenceThread()
            try:
                if self._reopen:
                    self._session = await self._worker.run(self._reopen)
                self.is_alive = True
            except Exception:  # whatever keeps it from opening may pass
                logger.exception("the network could not be started again, next attempt in %g s", pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_RETRY_DELAY_S)


def is_finite(raw: RawOutputs) -> bool:
    """Whether every number of the answer is one."""
    return all(bool(np.isfinite(numbers).all()) for numbers in (raw.scores, raw.boxes, raw.masks, raw.semantic))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a run failed for want of memory, so that a smaller one may do."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(each in words for each in _OUT_OF_MEMORY_MESSAGES)
