"""The scheduler batches images, bounds its queue, keeps deadlines, and fails only the failing image."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from model.contract import RawOutputs
from model.errors import DeadlineExceeded, InferenceError, NotReady, QueueFull
from service.inference.batch_scheduler import BatchScheduler, InferenceThreadDied
from service.metrics import Telemetry
from service.requests import RequestContext
from service.settings import Settings

FAILING, NAN, NAN_EMBEDDING, SHORT, DEADLY, HANGING = 13, 99, 98, 77, 66, 55
SOON_S, FAR_S = 0.01, 20.0

pytestmark = pytest.mark.anyio


class EchoSession:
    """Scores each image by its color once the gate is open; some colors fail, and `memory` limits a batch."""

    backend = "fake"

    def __init__(self, memory: int = 99, run_s: float = 0.0) -> None:
        self.memory = memory
        self.run_s = run_s
        self.hang = threading.Event()
        self.batches: list[list[int]] = []
        self.sizes: list[list[tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_inside = threading.Event()

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        colors = [int(each.max()) for each in pixels]
        self.batches.append(colors)
        self.sizes.append([tuple(size.tolist()) for size in sizes])
        self.is_inside.set()
        time.sleep(self.run_s)
        assert self.gate.wait(FAR_S)
        if FAILING in colors:
            raise ValueError("failing")
        if DEADLY in colors:
            raise SystemExit
        if HANGING in colors:
            self.hang.wait(FAR_S)
        if len(colors) > self.memory:
            raise RuntimeError("CUDA error: Out of memory")
        results = [self._output(color) for color in colors]
        return results[1:] if SHORT in colors else results

    def _output(self, color: int) -> RawOutputs:
        empty = np.zeros((1, 1, 1), np.float32)
        score = np.nan if color == NAN else color
        return RawOutputs(
            scores=np.array([score], np.float32),
            clusters=np.zeros(1, np.int64),
            boxes=np.zeros((1, 4), np.float32),
            masks=empty,
            semantic=empty,
            embeddings=np.full((1, 1, 1), np.nan if color == NAN_EMBEDDING else 1.0, np.float32),
        )


def paint(color: int) -> np.ndarray:
    return np.full((3, 2, 2), color, np.uint8)


@asynccontextmanager
async def run_scheduler(
    session: EchoSession,
    telemetry: Telemetry | None = None,
    reload: Callable[[], EchoSession] | None = None,
    **options: Any,
) -> AsyncIterator[BatchScheduler]:
    settings = Settings(**{"max_batch_size": 4, "max_queue_delay_ms": 0.0, "max_queue_size": 8, **options})
    scheduler = BatchScheduler(session, settings, telemetry or Telemetry(), reload or (lambda: session))
    await scheduler.start()
    try:
        yield scheduler
    finally:
        session.gate.set()
        await scheduler.stop()


def make_context(limit_s: float = FAR_S, owner: str = "", priority: int = 2) -> RequestContext:
    return RequestContext(deadline=asyncio.get_running_loop().time() + limit_s, owner=owner, priority=priority)


async def submit(
    scheduler: BatchScheduler, color: int, limit_s: float = FAR_S, owner: str = "", priority: int = 2
) -> float:
    inference = await scheduler.submit(paint(color), (2, 2), make_context(limit_s, owner, priority))
    return float(inference[0].scores[0])


def begin(scheduler: BatchScheduler, *colors: int) -> list[asyncio.Task[float]]:
    return [asyncio.create_task(submit(scheduler, color)) for color in colors]


async def occupy(scheduler: BatchScheduler, session: EchoSession) -> asyncio.Task[float]:
    """A submission that is inside the session, at its closed gate."""
    session.gate.clear()
    (task,) = begin(scheduler, 1)
    assert await asyncio.to_thread(session.is_inside.wait, FAR_S)
    return task


async def test_images_that_arrive_during_a_run_form_the_next_batch_in_order() -> None:
    session = EchoSession()
    async with run_scheduler(session) as scheduler:
        first = await occupy(scheduler, session)
        others = begin(scheduler, 2, 3, 4, 5, 6)
        await asyncio.wait(others, timeout=SOON_S)
        session.gate.set()
        assert await asyncio.gather(first, *others) == [1, 2, 3, 4, 5, 6]
    assert session.batches == [[1], [2, 3, 4, 5], [6]]


async def test_each_batch_has_one_input_size() -> None:
    session = EchoSession()
    async with run_scheduler(session, max_batch_size=2, max_queue_delay_ms=1000 * FAR_S) as scheduler:
        shapes = {4: (2, 2), 5: (2, 6), 6: (2, 2), 7: (2, 6)}
        inferences = await asyncio.gather(
            *(
                scheduler.submit(np.full((3, *shape), color, np.uint8), shape, make_context())
                for color, shape in shapes.items()
            )
        )
    assert [float(raw.scores[0]) for raw, _ in inferences] == [4, 5, 6, 7]
    assert session.batches == [[4, 6], [5, 7]]
    assert session.sizes == [[(2, 2), (2, 2)], [(2, 6), (2, 6)]]


async def test_an_image_past_its_deadline_is_never_run() -> None:
    session = EchoSession()
    async with run_scheduler(session) as scheduler:
        first = await occupy(scheduler, session)
        with pytest.raises(DeadlineExceeded):
            await submit(scheduler, 2, limit_s=SOON_S)
        session.gate.set()
        assert await first == 1
        assert await submit(scheduler, 3) == 3
    assert session.batches == [[1], [3]]


async def test_a_request_that_would_wait_too_long_or_miss_its_deadline_is_not_admitted() -> None:
    session = EchoSession(run_s=0.25)
    async with run_scheduler(session, max_batch_size=1, max_queue_wait_s=1.0) as scheduler:
        assert await submit(scheduler, 1) == 1
        session.is_inside.clear()
        tasks = [await occupy(scheduler, session), *begin(scheduler, 2, 3, 4, 5)]
        await asyncio.wait(tasks, timeout=SOON_S)
        with pytest.raises(QueueFull) as caught:
            scheduler.check_wait(make_context())
        assert caught.value.retry_after_s >= 2
        scheduler.check_wait(make_context(owner="other"))  # waits for two images only
        with pytest.raises(QueueFull):
            scheduler.check_wait(make_context(0.2, owner="other"))
        session.run_s = 0.0
        session.gate.set()
        await asyncio.gather(*tasks)
        scheduler.check_wait(make_context(0.2))  # no image is ahead: it may be tried


async def test_a_batch_too_large_for_memory_is_split_and_later_ones_are_smaller() -> None:
    session, telemetry = EchoSession(memory=3), Telemetry()
    async with run_scheduler(session, telemetry, max_batch_size=8, max_queue_delay_ms=50.0) as scheduler:
        colors = [20, 21, 22, 23, 24, 25, 26, 27]
        assert await asyncio.gather(*begin(scheduler, *colors)) == colors
        assert [len(batch) for batch in session.batches] == [8, 4, 2, 2, 4, 2, 2]
        assert await asyncio.gather(*begin(scheduler, 30, 31, 32)) == [30, 31, 32]
    assert [len(batch) for batch in session.batches[7:]] == [2, 1]
    assert telemetry.registry.get_sample_value("useg_batch_splits_total", {"reason": "memory"}) == 3.0


async def test_a_single_image_too_large_for_memory_may_be_retried_later() -> None:
    async with run_scheduler(EchoSession(memory=0)) as scheduler:
        with pytest.raises(QueueFull, match="out of memory"):
            await submit(scheduler, 2)


@pytest.mark.parametrize(
    ("color", "error"),
    [(FAILING, ValueError), (NAN, InferenceError), (NAN_EMBEDDING, InferenceError), (SHORT, InferenceError)],
)
async def test_a_failing_image_does_not_fail_its_batch(color: int, error: type[Exception]) -> None:
    telemetry = Telemetry()
    async with run_scheduler(EchoSession(), telemetry, max_queue_delay_ms=1000 * FAR_S) as scheduler:
        results = await asyncio.gather(*begin(scheduler, 2, color, 3, 4), return_exceptions=True)
        assert isinstance(results.pop(1), error)
        assert results == [2, 3, 4]
        assert await asyncio.gather(*begin(scheduler, 5, 6, 7, 8)) == [5, 6, 7, 8]
    assert telemetry.registry.get_sample_value("useg_inference_failures_total") == 1.0


async def test_stop_fails_waiting_images_and_rejects_new_ones() -> None:
    session = EchoSession()
    async with run_scheduler(session, max_batch_size=1) as scheduler:
        tasks = [await occupy(scheduler, session), *begin(scheduler, 2, 3)]
        await asyncio.wait(tasks, timeout=SOON_S)
        stopping = asyncio.create_task(scheduler.stop())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in results] == [NotReady] * 3
        session.gate.set()
        await stopping
        with pytest.raises(NotReady):
            await submit(scheduler, 4)


async def test_drain_releases_a_batch_that_is_filling() -> None:
    session, telemetry = EchoSession(), Telemetry()
    async with run_scheduler(session, telemetry, max_queue_delay_ms=1000 * FAR_S) as scheduler:
        tasks = begin(scheduler, 2, 3)
        await asyncio.wait(tasks, timeout=SOON_S)
        scheduler.drain()
        assert await asyncio.gather(*tasks) == [2, 3]
    labels = {"input_size": "2x2", "release_reason": "shutdown"}
    assert telemetry.registry.get_sample_value("useg_batch_size_sum", labels) == 2.0
    assert telemetry.registry.get_sample_value("useg_batch_padding_ratio_sum") == 0.0


@pytest.mark.parametrize("color", [DEADLY, HANGING])
async def test_a_dead_or_hanging_thread_is_replaced_and_waiting_images_succeed(color: int) -> None:
    session, following, telemetry = EchoSession(), EchoSession(), Telemetry()
    may_open = threading.Event()

    def reload() -> EchoSession:
        assert may_open.wait(FAR_S)
        return following

    async with run_scheduler(
        session, telemetry, max_batch_size=1, inference_timeout_s=0.05, reload=reload
    ) as scheduler:
        culprit, waits = begin(scheduler, color, 2)
        with pytest.raises(InferenceThreadDied):
            await culprit
        assert (scheduler.is_alive, waits.done()) == (False, False)
        may_open.set()
        assert await waits == 2
        assert scheduler.is_alive
    session.hang.set()
    assert following.batches == [[2]]
    assert telemetry.registry.get_sample_value("useg_worker_restarts_total", {"part": "worker"}) == 1.0


async def test_streams_run_at_once_and_one_replaces_its_thread_while_the_other_runs() -> None:
    barrier, may_reload = threading.Barrier(2), threading.Event()

    class MeetingSession(EchoSession):
        def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
            if pixels.max() < 3:
                barrier.wait(FAR_S)  # until both streams are here
            return super().run(pixels, sizes)

    def reload() -> EchoSession:
        assert may_reload.wait(FAR_S)
        return EchoSession()

    async with run_scheduler(MeetingSession(), max_batch_size=1, streams=2, reload=reload) as scheduler:
        assert await asyncio.gather(*begin(scheduler, 1, 2)) == [1, 2]
        with pytest.raises(InferenceThreadDied):
            await submit(scheduler, DEADLY)
        assert not scheduler.is_alive
        assert await submit(scheduler, 3) == 3
        may_reload.set()


async def test_the_batch_of_an_image_that_killed_the_thread_may_be_retried() -> None:
    session = EchoSession()
    async with run_scheduler(session, max_queue_delay_ms=1000 * FAR_S) as scheduler:
        results = await asyncio.gather(*begin(scheduler, 2, DEADLY, 3, 4), return_exceptions=True)
        assert [type(answer) for answer in results] == [NotReady] * 4
        assert await asyncio.gather(*begin(scheduler, 5, 6, 7, 8)) == [5, 6, 7, 8]


async def test_random_crashes_cancellations_and_failures_leave_no_request_hanging() -> None:
    rng = np.random.default_rng(0)
    session = EchoSession()
    async with run_scheduler(session, max_batch_size=4, max_queue_delay_ms=0.1, max_queue_size=64) as scheduler:
        for _ in range(30):
            tasks = begin(
                scheduler, *rng.choice([1, 2, 3, 4, FAILING, NAN, DEADLY], 12, p=[0.21] * 4 + [0.06, 0.06, 0.04])
            )
            await asyncio.sleep(0)
            for each in rng.choice(len(tasks), 3):
                tasks[each].cancel()
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), FAR_S)
            assert len(results) == 12
        assert await submit(scheduler, 5) == 5
        assert scheduler.is_idle
