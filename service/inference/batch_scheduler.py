"""Dynamic batching. If a batch fails, it is split until only the failing image gets an error."""

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from model.backends.session import Session
from model.contract import RawOutputs
from model.errors import InferenceError, NotReady, QueueFull
from service.inference.queue import (
    BatchQueue,
    ImageBatch,
    InferenceResult,
    QueuedImage,
    make_deadline_error,
)
from service.metrics import Telemetry
from service.requests import RequestContext
from service.settings import Settings

logger = logging.getLogger(__name__)

_MAX_WAIT_FRACTION = 0.9
"""Fraction of the time left that waiting and the run may take; the rest is for what follows."""
_MAX_RETRY_DELAY_S = 30.0
"""Between attempts to make a session again."""
_STOP_TIMEOUT_S = 10.0
"""For a run that has started, when the scheduler stops."""
_OUT_OF_MEMORY_MESSAGES = ("out of memory", "failed to allocate", "bad_alloc", "bad allocation")
"""Lower-case messages of CUDA, ONNX Runtime's arenas and C++; none of them raises a class of its own."""

T = TypeVar("T")


class InferenceThreadDied(InferenceError):
    """A thread that ended or did not return from a call; the service starts another."""


class InferenceThread:
    """One thread that runs one call after the other.

    Not an executor: its threads would keep the process from exiting while one hangs in a driver.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run_calls, name="inference", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T], timeout_s: float | None = None) -> T:
        """Return what `call` returns. Raises InferenceThreadDied if the thread ends or `timeout_s` has passed."""
        future: Future[T] = Future()
        self._calls.put((call, future))
        waiting = asyncio.wrap_future(future)
        await asyncio.wait({waiting}, timeout=timeout_s)
        if not waiting.done():
            waiting.cancel()
            raise InferenceThreadDied(f"inference did not finish within {timeout_s:g} s")
        return waiting.result()

    async def stop(self, timeout_s: float) -> None:
        """End the thread after the calls so far; if that takes longer than `timeout_s`, abandon it."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            logger.warning("the inference thread did not stop within %g s; abandoned", timeout_s)

    def abandon(self) -> None:
        """Let the thread end when its current call returns."""
        self._calls.put(None)

    def _run_calls(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:  # a session may raise anything
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(InferenceThreadDied(f"the inference thread ended: {type(error).__name__}"))
                return
            del item, call, future  # or the batch stays in memory until the next call


@dataclass(kw_only=True, eq=False)
class _Stream:
    """One of the batches that run at once, and its thread."""

    thread: InferenceThread = field(default_factory=InferenceThread)
    running: list[QueuedImage] = field(default_factory=list)
    is_alive: bool = True

    def fail(self, error: Exception) -> None:
        """Fail the images of its batch."""
        for image in self.running:
            image.fail(error)
        self.running = []


class BatchScheduler:
    """A bounded queue in front of a session that runs on threads of its own, one for each stream.

    Each request holds a slot from its headers to its response, so that bodies cannot pile up before the queue.
    Times are in seconds on the running event loop's clock.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        telemetry: Telemetry,
        reload: Callable[[], Session],
    ) -> None:
        """`reload` makes a new session when an inference thread has died."""
        self._session = session
        self._settings = settings
        self._telemetry = telemetry
        self._reload = reload
        self._queue = BatchQueue(settings)
        self._queue_changed = asyncio.Event()
        self._streams = [_Stream() for _ in range(settings.streams)]
        self._loops: list[asyncio.Task[None]] = []
        self._slots: dict[asyncio.Task[Any] | None, RequestContext] = {}
        """By the task that holds the slot, the newest last."""
        self.runs = 0
        """Batches that have been run."""

    @property
    def is_alive(self) -> bool:
        """False while an inference thread is being replaced."""
        return all(stream.is_alive for stream in self._streams)

    @property
    def depth(self) -> int:
        """Number of images that wait."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Number of requests that hold a slot."""
        return len(self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether no image waits or runs."""
        return not self._queue and not self._running

    @property
    def _running(self) -> list[QueuedImage]:
        return [image for stream in self._streams for image in stream.running]

    async def start(self) -> None:
        """Start to run batches, on the event loop that will submit."""
        self._loops = [asyncio.create_task(self._run_batches(stream)) for stream in self._streams]

    def drain(self) -> None:
        """Run batches without waiting for more images."""
        self._queue.is_draining = True
        self._queue_changed.set()

    async def stop(self) -> None:
        """Reject new images, fail those that wait with NotReady, and wait for the threads to end."""
        loops, self._loops = self._loops, []
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        for image in [*self._queue, *self._running]:
            self._queue.discard(image)
            image.fail(NotReady("the server is shutting down: try again in a moment"))
        await asyncio.gather(*(stream.thread.stop(_STOP_TIMEOUT_S) for stream in self._streams))

    @contextmanager
    def admit(self, context: RequestContext) -> Iterator[None]:
        """Hold a slot for the current task.

        If all slots are taken, a request gets the slot of a less urgent one, or the newest slot of the client that has
        most, if that has at least two more than its own client (longest queue drop).
        Raises QueueFull if there is no slot, when it is revoked, and as `check_wait`.
        """
        self.check_wait(context)
        if len(self._slots) >= self._settings.max_queue_size + self._settings.streams * self._settings.max_batch_size:
            self._revoke_slot(context)
        task = asyncio.current_task()
        self._slots[task] = context
        try:
            yield
        except asyncio.CancelledError:
            if task and task not in self._slots and task.uncancel() == 0:
                raise self.make_queue_full() from None
            raise
        finally:
            self._slots.pop(task, None)

    def _revoke_slot(self, context: RequestContext) -> None:
        counts = Counter(each.owner for each in self._slots.values())
        lowest = max(each.priority for each in self._slots.values())
        # Among equals the last one: the newest request has cost least so far.
        candidates = [task for task, each in reversed(self._slots.items()) if each.priority == lowest]
        victim = max(candidates, key=lambda task: counts[self._slots[task].owner])
        has_more = counts[self._slots[victim].owner] >= counts[context.owner] + 2 and context.priority <= lowest
        if not has_more and context.priority >= lowest:
            raise self.make_queue_full()
        del self._slots[victim]
        if victim:
            victim.cancel()

    async def submit(
        self,
        pixels: UInt8[np.ndarray, "3 H W"],
        size: tuple[int, int],
        context: RequestContext,
        on_start: Callable[[], None] = lambda: None,
    ) -> InferenceResult:
        """Return the outputs for an image of `size` (height, width) at the top left of `pixels`, and its run's seconds.

        `on_start` is called when its run starts. A cancelled call leaves the queue.
        Raises QueueFull if the queue is full, DeadlineExceeded at the deadline, NotReady if the scheduler is stopped,
        and whatever the session raises for this image.
        """
        loop = asyncio.get_running_loop()
        if not self._loops:
            raise NotReady("the model is not running: try again in a moment")
        if len(self._queue) >= self._settings.max_queue_size:
            raise self.make_queue_full()
        image = QueuedImage(pixels=pixels, size=size, context=context, submitted=loop.time(), on_start=on_start)
        self._queue.put(image)
        self._queue_changed.set()
        try:
            await asyncio.wait({image.future}, timeout=context.deadline - loop.time())
            if not image.future.done():
                raise make_deadline_error()
            return image.future.result()
        finally:
            image.future.cancel()
            self._queue.discard(image)

    def make_queue_full(self) -> QueueFull:
        """Return the error of a request that is rejected; when to retry follows from the queue and recent runs."""
        ahead = len(self._queue) + len(self._running)
        return QueueFull(
            f"the queue is full, {ahead} images are waiting: try again later",
            retry_after_s=max(1, math.ceil(self._queue.estimate_wait(ahead))),
        )

    def check_wait(self, context: RequestContext, images: int = 1) -> None:
        """Raise QueueFull if the queue has no room for these images, or they would miss their deadline in it."""
        if len(self._queue) + images > self._settings.max_queue_size:
            raise self.make_queue_full()
        ahead = len(self._running) + self._queue.count_ahead(context)
        time_left_s = context.deadline - asyncio.get_running_loop().time()
        if not ahead or not self._queue.is_measured or time_left_s <= 0.0:
            return
        # A queue that outlasts the clients' timeouts would only be worked off for those who have given up.
        is_late = self._queue.estimate_wait(ahead + images) > _MAX_WAIT_FRACTION * time_left_s
        if is_late or self._queue.estimate_wait(ahead) > self._settings.max_queue_wait_s:
            raise self.make_queue_full()

    async def _run_batches(self, stream: _Stream) -> None:
        """Run batches until cancelled; no exception ends the loop."""
        while True:
            try:
                images, reason = await self._next_batch()
                stream.running = images
                self.runs += 1
                height, width = images[0].pixels.shape[-2:]
                self._telemetry.observe_batch((height, width), [image.size for image in images], reason)
                for image in images:
                    image.on_start()
                await self._infer(stream, images)
            except InferenceThreadDied as error:
                await self._replace_thread(stream, error)
            except Exception as error:  # a bug of ours must not end the loop, or all later requests would hang
                logger.exception("a batch of %d failed outside its session", len(stream.running))
                stream.fail(error)
            stream.running = []

    async def _next_batch(self) -> ImageBatch:
        """Wait for the next batch; images that are late or cancelled are dropped here."""
        loop = asyncio.get_running_loop()
        while True:
            self._queue_changed.clear()
            for image in [each for each in self._queue if each.future.done() or each.context.deadline <= loop.time()]:
                self._queue.discard(image)
                image.fail(make_deadline_error())
            choice = self._queue.take_batch(loop.time())
            if isinstance(choice, tuple):
                return choice
            with suppress(TimeoutError):
                async with asyncio.timeout(choice):
                    await self._queue_changed.wait()

    async def _infer(self, stream: _Stream, images: list[QueuedImage]) -> None:
        """Run images together; if that fails, in halves, until only the failing image is left."""
        images = [image for image in images if not image.future.done()]
        if not images:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            outputs = await stream.thread.run(lambda: self._run_session(images), self._settings.inference_timeout_s)
        except InferenceThreadDied:
            raise
        except Exception as error:  # backends raise their own exceptions, which have no common base
            await self._split(stream, images, error)
            return
        infer_s = loop.time() - started
        self._queue.record(images[0].pixels.shape, infer_s)
        for image, raw in zip(images, outputs, strict=True):
            if raw is None:
                self._telemetry.inference_failures.inc()
                image.fail(InferenceError("the network's outputs are not finite"))
            else:
                image.finish((raw, infer_s))

    async def _split(self, stream: _Stream, images: list[QueuedImage], error: Exception) -> None:
        """Run the halves of a failed batch; fail a single image."""
        out_of_memory = is_out_of_memory(error)
        if len(images) == 1:
            self._telemetry.inference_failures.inc()
            retry_after_s = self.make_queue_full().retry_after_s
            no_memory = QueueFull("the device is out of memory: try again later", retry_after_s=retry_after_s)
            images[0].fail(no_memory if out_of_memory else error)
            return
        if out_of_memory:
            self._queue.halve_limit(images[0].pixels.shape, len(images))
        logger.warning("a batch of %d failed (%s), retrying in halves", len(images), type(error).__name__)
        self._telemetry.batch_splits.labels("memory" if out_of_memory else "error").inc()
        middle = (len(images) + 1) // 2
        await self._infer(stream, images[:middle])
        await self._infer(stream, images[middle:])

    def _run_session(self, images: list[QueuedImage]) -> list[RawOutputs | None]:
        """Return the outputs in order; None for those that are not finite."""
        sizes = np.array([image.size for image in images])
        outputs = self._session.run(np.stack([image.pixels for image in images]), sizes)
        if len(outputs) != len(images):
            raise InferenceError(f"the session returned {len(outputs)} outputs for {len(images)} images")
        return [raw if is_finite(raw) else None for raw in outputs]

    async def _replace_thread(self, stream: _Stream, error: InferenceThreadDied) -> None:
        """Start a new thread with a new session; until then the stream runs no image."""
        logger.error("restarting the inference worker: %s", error)
        stream.is_alive = False
        self._telemetry.worker_restarts.labels("worker").inc()
        is_single = len(stream.running) == 1
        stream.fail(error if is_single else NotReady("the inference worker died with this image: try again"))
        delay_s = 1.0
        while not stream.is_alive:
            stream.thread.abandon()
            stream.thread = InferenceThread()
            try:
                self._session = await stream.thread.run(self._reload)
                stream.is_alive = True
            except Exception:  # of any kind: it may pass
                logger.exception("the inference worker could not be restarted, next attempt in %g s", delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_RETRY_DELAY_S)


def is_finite(raw: RawOutputs) -> bool:
    """Return whether all numbers of the outputs are finite."""
    parts = (raw.scores, raw.boxes, raw.masks, raw.semantic, raw.embeddings)
    return all(bool(np.isfinite(part).all()) for part in parts if part is not None)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a run failed for lack of memory, so that a smaller one may succeed."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(each in message for each in _OUT_OF_MEMORY_MESSAGES)
