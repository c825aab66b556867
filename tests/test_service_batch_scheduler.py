"""The engine batches, bounds its queue, keeps deadlines, and lets only the culprit fail."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from model.errors import DeadlineExceeded, InferenceError, NotReady, QueueFull
from model.network_io import RawOutputs
from service.inference.batch_scheduler import BatchScheduler
from service.inference.worker import InferenceThreadDied
from service.requests import RequestContext
from service.telemetry.metrics import Telemetry

POISON, NAN, SHORT, DEADLY, HANGING = 13, 99, 77, 66, 55
SOON_S, FAR_S = 0.01, 20.0

pytestmark = pytest.mark.anyio


class EchoSession:
    """Scores each picture by its colour, once its gate is open; some colours go wrong, and `memory` bounds a batch."""

    backend = "fake"

    def __init__(self, memory: int = 99) -> None:
        self.memory = memory
        self.hang = threading.Event()
        self.batches: list[list[int]] = []
        self.sizes: list[list[tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_inside = threading.Event()

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        colours = [int(each.max()) for each in pixels]
        self.batches.append(colours)
        self.sizes.append([tuple(size.tolist()) for size in sizes])
        self.is_inside.set()
        assert self.gate.wait(FAR_S)
        if POISON in colours:
            raise ValueError("poison")
        if DEADLY in colours:
            raise SystemExit
        if HANGING in colours:
            self.hang.wait(FAR_S)
        if len(colours) > self.memory:
            raise RuntimeError("CUDA error: Out of memory")
        answers = [self._answer(colour) for colour in colours]
        return answers[1:] if SHORT in colours else answers

    def _answer(self, colour: int) -> RawOutputs:
        empty = np.zeros((1, 1, 1), np.float32)
        score = np.nan if colour == NAN else colour
        return RawOutputs(
            scores=np.array([score], np.float32),
            clusters=np.zeros(1, np.int64),
            boxes=np.zeros((1, 4), np.float32),
            masks=empty,
            semantic=empty,
        )


def paint(colour: int) -> np.ndarray:
    return np.full((3, 2, 2), colour, np.uint8)


@asynccontextmanager
async def run_engine(
    session: EchoSession, telemetry: Telemetry | None = None, **options: Any
) -> AsyncIterator[BatchScheduler]:
    chosen = {"max_batch_size": 4, "max_queue_delay_ms": 0.0, "capacity": 8, **options}
    engine = BatchScheduler(session, telemetry or Telemetry(), **chosen)
    await engine.start()
    try:
        yield engine
    finally:
        session.gate.set()
        await engine.stop()


def claim(limit_s: float = FAR_S, owner: str = "", priority: int = 2) -> RequestContext:
    return RequestContext(deadline=asyncio.get_running_loop().time() + limit_s, owner=owner, priority=priority)


async def ask(engine: BatchScheduler, colour: int, limit_s: float = FAR_S, owner: str = "", priority: int = 2) -> float:
    inference = await engine.submit(paint(colour), (2, 2), claim(limit_s, owner, priority))
    return float(inference.raw.scores[0])


def begin(engine: BatchScheduler, *colours: int) -> list[asyncio.Task[float]]:
    return [asyncio.create_task(ask(engine, colour)) for colour in colours]


async def occupy(engine: BatchScheduler, session: EchoSession) -> asyncio.Task[float]:
    """A submission that is inside the session, at its closed gate."""
    session.gate.clear()
    (task,) = begin(engine, 1)
    assert await asyncio.to_thread(session.is_inside.wait, FAR_S)
    return task


async def test_what_waits_during_a_run_goes_into_the_next_one_together_and_in_order() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        first = await occupy(engine, session)
        others = begin(engine, 2, 3, 4, 5, 6)
        await asyncio.wait(others, timeout=SOON_S)
        session.gate.set()
        assert await asyncio.gather(first, *others) == [1, 2, 3, 4, 5, 6]
    assert session.batches == [[1], [2, 3, 4, 5], [6]]


async def test_a_batch_waits_for_company_no_longer_than_it_is_full() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=2, max_queue_delay_ms=1000 * FAR_S) as engine:
        assert await asyncio.gather(*begin(engine, 7, 8)) == [7, 8]
    assert session.batches == [[7, 8]]


async def test_each_batch_is_of_one_canvas() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=2, max_queue_delay_ms=1000 * FAR_S) as engine:
        shapes = {4: (2, 2), 5: (2, 6), 6: (2, 2), 7: (2, 6)}
        inferences = await asyncio.gather(
            *(engine.submit(np.full((3, *shape), colour, np.uint8), shape, claim()) for colour, shape in shapes.items())
        )
    assert [float(inference.raw.scores[0]) for inference in inferences] == [4, 5, 6, 7]
    assert session.batches == [[4, 6], [5, 7]]
    assert session.sizes == [[(2, 2), (2, 2)], [(2, 6), (2, 6)]]


async def test_a_full_queue_is_busy_and_says_when_to_come_back() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=1, capacity=3) as engine:
        tasks = [await occupy(engine, session), *begin(engine, 2, 3, 4)]
        await asyncio.wait(tasks, timeout=SOON_S)
        with pytest.raises(QueueFull, match="4 pictures are waiting") as caught:
            await ask(engine, 5)
        assert caught.value.retry_after_s == 2  # four runs of half a second, the first guess
        session.gate.set()
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4]


async def test_a_deadline_ends_the_wait_and_the_late_picture_is_never_run() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        first = await occupy(engine, session)
        with pytest.raises(DeadlineExceeded):
            await ask(engine, 2, limit_s=SOON_S)
        session.gate.set()
        assert await first == 1
        assert await ask(engine, 3) == 3
    assert session.batches == [[1], [3]]


async def test_a_deadline_in_the_past_is_refused_before_any_run() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        with pytest.raises(DeadlineExceeded):
            await ask(engine, 2, limit_s=-1.0)
    assert session.batches == []


async def test_a_picture_that_cannot_be_in_time_is_turned_away_at_once() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=1) as engine:
        assert await ask(engine, 1) == 1
        engine._batcher.learn((3, 2, 2), 1000 * FAR_S)  # a run takes an hour, as far as the engine knows
        session.gate.clear()
        session.is_inside.clear()
        running = begin(engine, 2)[0]
        assert await asyncio.to_thread(session.is_inside.wait, FAR_S)
        with pytest.raises(QueueFull) as caught:
            await ask(engine, 3)
        assert caught.value.retry_after_s > FAR_S
        session.gate.set()
        assert await running == 2
        assert await ask(engine, 4) == 4  # nobody is ahead: it is tried


async def test_a_queue_longer_than_callers_are_patient_is_not_begun() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=1, max_queue_wait_s=2.5) as engine:
        assert await ask(engine, 1) == 1
        engine._batcher.learn((3, 2, 2), 5.0)  # a run takes one second, as far as the engine knows
        session.is_inside.clear()
        tasks = [await occupy(engine, session), *begin(engine, 2)]
        await asyncio.wait(tasks, timeout=SOON_S)
        (taken,) = begin(engine, 3)
        await asyncio.wait({taken}, timeout=SOON_S)
        with pytest.raises(QueueFull):
            await ask(engine, 4)
        other = asyncio.create_task(ask(engine, 5, owner="other"))  # waits for two alone
        await asyncio.wait({other}, timeout=SOON_S)
        session.gate.set()
        assert await asyncio.gather(*tasks, taken, other) == [1, 2, 3, 5]


async def test_urgent_pictures_and_modest_callers_go_first() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=2) as engine:
        first = await occupy(engine, session)
        others = [asyncio.create_task(ask(engine, colour, owner="greedy")) for colour in (2, 3, 4)]
        others += [asyncio.create_task(ask(engine, 5, owner="modest"))]
        others += [asyncio.create_task(ask(engine, 6, priority=1))]
        await asyncio.wait(others, timeout=SOON_S)
        session.gate.set()
        await asyncio.gather(first, *others)
    assert session.batches == [[1], [6, 2], [5, 3], [4]]


async def test_a_cancelled_picture_is_never_run() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        first = await occupy(engine, session)
        gone, stays = begin(engine, 2, 3)
        await asyncio.wait({gone, stays}, timeout=SOON_S)
        gone.cancel()
        await asyncio.wait({gone})
        session.gate.set()
        assert await asyncio.gather(first, stays) == [1, 3]
    assert session.batches == [[1], [3]]


async def test_cancelling_a_picture_inside_a_run_leaves_its_neighbours_alone() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        first = await occupy(engine, session)
        first.cancel()
        await asyncio.wait({first})
        session.gate.set()
        assert await ask(engine, 2) == 2


async def test_of_sixteen_pictures_with_one_poison_fifteen_are_answered() -> None:
    session, telemetry = EchoSession(), Telemetry()
    async with run_engine(
        session, telemetry, max_batch_size=16, max_queue_delay_ms=1000 * FAR_S, capacity=16
    ) as engine:
        colours = [*range(20, 30), POISON, *range(30, 35)]
        answers = await asyncio.gather(*begin(engine, *colours), return_exceptions=True)
    assert str(answers.pop(10)) == "poison"
    assert answers == [*range(20, 35)]
    assert len(session.batches) == 9  # itself, and two halves at each of four levels
    assert telemetry.registry.get_sample_value("useg_inference_failures_total") == 1.0


async def test_a_batch_too_large_for_memory_is_halved_and_so_are_the_next_ones() -> None:
    session, telemetry = EchoSession(memory=3), Telemetry()
    async with run_engine(session, telemetry, max_batch_size=8, max_queue_delay_ms=50.0) as engine:
        colours = [20, 21, 22, 23, 24, 25, 26, 27]
        assert await asyncio.gather(*begin(engine, *colours)) == colours
        assert [len(batch) for batch in session.batches] == [8, 4, 2, 2, 4, 2, 2]
        assert await asyncio.gather(*begin(engine, 30, 31, 32)) == [30, 31, 32]
    assert [len(batch) for batch in session.batches[7:]] == [2, 1]
    assert telemetry.registry.get_sample_value("useg_batch_splits_total", {"reason": "memory"}) == 3.0


async def test_one_picture_too_large_for_memory_may_come_back_later() -> None:
    async with run_engine(EchoSession(memory=0)) as engine:
        with pytest.raises(QueueFull, match="short of memory"):
            await ask(engine, 2)


@pytest.mark.parametrize(("colour", "error"), [(POISON, ValueError), (NAN, InferenceError), (SHORT, InferenceError)])
async def test_one_bad_picture_fails_alone(colour: int, error: type[Exception]) -> None:
    session = EchoSession()
    async with run_engine(session, max_queue_delay_ms=1000 * FAR_S) as engine:
        answers = await asyncio.gather(*begin(engine, 2, colour, 3, 4), return_exceptions=True)
        assert isinstance(answers.pop(1), error)
        assert answers == [2, 3, 4]
        assert await asyncio.gather(*begin(engine, 5, 6, 7, 8)) == [5, 6, 7, 8]


async def test_the_loop_survives_many_failures() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=1) as engine:
        failures = await asyncio.gather(*begin(engine, *[POISON] * 8), return_exceptions=True)
        assert [str(failure) for failure in failures] == ["poison"] * 8
        assert await ask(engine, 2) == 2


async def test_a_stop_fails_what_waits_and_takes_no_more() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch_size=1) as engine:
        tasks = [await occupy(engine, session), *begin(engine, 2, 3)]
        await asyncio.wait(tasks, timeout=SOON_S)
        stopping = asyncio.create_task(engine.stop())
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [NotReady] * 3
        session.gate.set()
        await stopping
        with pytest.raises(NotReady):
            await ask(engine, 4)


async def test_a_stop_while_a_batch_fills_fails_its_first_picture() -> None:
    session = EchoSession()
    async with run_engine(session, max_queue_delay_ms=1000 * FAR_S) as engine:
        (task,) = begin(engine, 2)
        await asyncio.wait({task}, timeout=SOON_S)
        await engine.stop()
        with pytest.raises(NotReady):
            await task


async def test_a_drain_releases_a_batch_that_waits_for_company() -> None:
    session, telemetry = EchoSession(), Telemetry()
    async with run_engine(session, telemetry, max_queue_delay_ms=1000 * FAR_S) as engine:
        tasks = begin(engine, 2, 3)
        await asyncio.wait(tasks, timeout=SOON_S)
        engine.drain()
        assert await asyncio.gather(*tasks) == [2, 3]
    labels = {"input_size": "2x2", "release_reason": "shutdown"}
    assert telemetry.registry.get_sample_value("useg_batch_size_sum", labels) == 2.0
    assert telemetry.registry.get_sample_value("useg_batch_padding_ratio_sum") == 0.0


@pytest.mark.parametrize("colour", [DEADLY, HANGING])
async def test_a_dead_worker_is_noticed_and_replaced_and_those_who_wait_are_answered(colour: int) -> None:
    session, following, telemetry = EchoSession(), EchoSession(), Telemetry()
    may_open = threading.Event()

    def reopen() -> EchoSession:
        assert may_open.wait(FAR_S)
        return following

    async with run_engine(session, telemetry, max_batch_size=1, inference_timeout_s=0.05, reopen=reopen) as engine:
        culprit, waits = begin(engine, colour, 2)
        with pytest.raises(InferenceThreadDied):
            await culprit
        assert (engine.is_alive, waits.done()) == (False, False)
        may_open.set()
        assert await waits == 2
        assert engine.is_alive
    session.hang.set()
    assert following.batches == [[2]]
    assert telemetry.registry.get_sample_value("useg_worker_restarts_total", {"part": "worker"}) == 1.0


async def test_neighbours_of_a_picture_that_killed_the_worker_may_come_back() -> None:
    session = EchoSession()
    async with run_engine(session, max_queue_delay_ms=1000 * FAR_S) as engine:
        answers = await asyncio.gather(*begin(engine, 2, DEADLY, 3, 4), return_exceptions=True)
        assert [type(answer) for answer in answers] == [NotReady] * 4
        assert await asyncio.gather(*begin(engine, 5, 6, 7, 8)) == [5, 6, 7, 8]


async def test_a_loop_that_ends_is_started_again() -> None:
    session, telemetry = EchoSession(), Telemetry()
    async with run_engine(session, telemetry) as engine:
        assert engine._loop_task is not None
        engine._loop_task.cancel()
        assert await ask(engine, 2) == 2
    assert telemetry.registry.get_sample_value("useg_worker_restarts_total", {"part": "loop"}) == 1.0


async def test_random_deaths_cancels_and_poison_hang_nobody() -> None:
    rng = np.random.default_rng(0)
    session = EchoSession()
    async with run_engine(session, max_batch_size=4, max_queue_delay_ms=0.1, capacity=64) as engine:
        for _ in range(30):
            tasks = begin(engine, *rng.choice([1, 2, 3, 4, POISON, NAN, DEADLY], 12, p=[0.21] * 4 + [0.06, 0.06, 0.04]))
            await asyncio.sleep(0)
            for each in rng.choice(len(tasks), 3):
                tasks[each].cancel()
            answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), FAR_S)
            assert len(answers) == 12
        assert await ask(engine, 5) == 5
        assert len(engine._queue) == 0
