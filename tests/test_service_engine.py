"""The engine batches, bounds its queue, keeps deadlines, and lets only the culprit fail."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from model.errors import Busy, DeadlinePassed, InferenceError, NotReady
from model.raw import Raw
from service.engine import Engine
from service.telemetry import Telemetry

POISON, NAN, SHORT = 13, 99, 77
SOON_S, FAR_S = 0.01, 20.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class EchoSession:
    """Scores each picture by its colour, once its gate is open; colours POISON, NAN and SHORT go wrong."""

    backend = "fake"

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.sizes: list[list[tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_inside = threading.Event()

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[Raw]:
        colours = [int(each.max()) for each in pixels]
        self.batches.append(colours)
        self.sizes.append([tuple(size.tolist()) for size in sizes])
        self.is_inside.set()
        assert self.gate.wait(FAR_S)
        if POISON in colours:
            raise ValueError("poison")
        answers = [self._answer(colour) for colour in colours]
        return answers[1:] if SHORT in colours else answers

    def _answer(self, colour: int) -> Raw:
        empty = np.zeros((1, 1, 1), np.float32)
        score = np.nan if colour == NAN else colour
        return Raw(
            scores=np.array([score], np.float32),
            clusters=np.zeros(1, np.int64),
            boxes=np.zeros((1, 4), np.float32),
            masks=empty,
            semantic=empty,
        )


def paint(colour: int) -> np.ndarray:
    return np.full((3, 2, 2), colour, np.uint8)


@asynccontextmanager
async def run_engine(session: EchoSession, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(session, Telemetry(), **{"max_batch": 4, "max_wait_ms": 0.0, "capacity": 8, **options})
    await engine.start()
    try:
        yield engine
    finally:
        session.gate.set()
        await engine.stop()


async def ask(engine: Engine, colour: int, limit_s: float = FAR_S) -> float:
    inference = await engine.submit(paint(colour), (2, 2), asyncio.get_running_loop().time() + limit_s)
    return float(inference.raw.scores[0])


def begin(engine: Engine, *colours: int) -> list[asyncio.Task[float]]:
    return [asyncio.create_task(ask(engine, colour)) for colour in colours]


async def occupy(engine: Engine, session: EchoSession) -> asyncio.Task[float]:
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
    async with run_engine(session, max_batch=2, max_wait_ms=1000 * FAR_S) as engine:
        assert await asyncio.gather(*begin(engine, 7, 8)) == [7, 8]
    assert session.batches == [[7, 8]]


async def test_pictures_on_different_canvases_share_a_batch_but_no_run() -> None:
    session = EchoSession()
    late = asyncio.get_running_loop().time() + FAR_S
    async with run_engine(session, max_batch=3, max_wait_ms=1000 * FAR_S) as engine:
        shapes = {4: (2, 2), 5: (2, 6), 6: (2, 2)}
        inferences = await asyncio.gather(
            *(engine.submit(np.full((3, *shape), colour, np.uint8), shape, late) for colour, shape in shapes.items())
        )
    assert [float(inference.raw.scores[0]) for inference in inferences] == [4, 5, 6]
    assert sorted(session.batches) == [[4, 6], [5]]
    assert sorted(session.sizes) == [[(2, 2), (2, 2)], [(2, 6)]]


async def test_a_full_queue_is_busy_and_says_when_to_come_back() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch=1, capacity=3) as engine:
        tasks = [await occupy(engine, session), *begin(engine, 2, 3, 4)]
        await asyncio.wait(tasks, timeout=SOON_S)
        with pytest.raises(Busy, match="4 pictures are waiting") as caught:
            await ask(engine, 5)
        assert caught.value.retry_after_s == 2  # four runs of half a second, the first guess
        session.gate.set()
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4]


async def test_a_deadline_ends_the_wait_and_the_late_picture_is_never_run() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        first = await occupy(engine, session)
        with pytest.raises(DeadlinePassed):
            await ask(engine, 2, limit_s=SOON_S)
        session.gate.set()
        assert await first == 1
        assert await ask(engine, 3) == 3
    assert session.batches == [[1], [3]]


async def test_a_deadline_in_the_past_is_refused_before_any_run() -> None:
    session = EchoSession()
    async with run_engine(session) as engine:
        with pytest.raises(DeadlinePassed):
            await ask(engine, 2, limit_s=-1.0)
    assert session.batches == []


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


@pytest.mark.parametrize(("colour", "error"), [(POISON, ValueError), (NAN, InferenceError), (SHORT, InferenceError)])
async def test_one_bad_picture_fails_alone(colour: int, error: type[Exception]) -> None:
    session = EchoSession()
    async with run_engine(session, max_wait_ms=1000 * FAR_S) as engine:
        answers = await asyncio.gather(*begin(engine, 2, colour, 3, 4), return_exceptions=True)
        assert isinstance(answers.pop(1), error)
        assert answers == [2, 3, 4]
        assert await asyncio.gather(*begin(engine, 5, 6, 7, 8)) == [5, 6, 7, 8]


async def test_the_loop_survives_many_failures() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch=1) as engine:
        failures = await asyncio.gather(*begin(engine, *[POISON] * 8), return_exceptions=True)
        assert [str(failure) for failure in failures] == ["poison"] * 8
        assert await ask(engine, 2) == 2


async def test_a_stop_fails_what_waits_and_takes_no_more() -> None:
    session = EchoSession()
    async with run_engine(session, max_batch=1) as engine:
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
    async with run_engine(session, max_wait_ms=1000 * FAR_S) as engine:
        (task,) = begin(engine, 2)
        await asyncio.wait({task}, timeout=SOON_S)
        await engine.stop()
        with pytest.raises(NotReady):
            await task
