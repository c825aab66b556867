"""The first session runs until the next is ready, and stays if that fails."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from model.backends.session import HotSwapSession
from model.errors import ParityError
from model.network_io import RawOutputs

PIXELS, SIZES = np.zeros((1, 3, 8, 8), np.uint8), np.array([[8, 8]])
WAIT_S = 10.0


class ScoringSession:
    """Returns the same score for every image."""

    def __init__(self, backend: str, score: float) -> None:
        self.backend = backend
        self._score = score

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        empty = np.zeros((1, 2, 2), np.float32)
        output = RawOutputs(
            scores=np.array([self._score], np.float32),
            clusters=np.array([0]),
            boxes=np.zeros((1, 4), np.float32),
            masks=empty,
            semantic=empty,
        )
        return [output] * len(pixels)


class Builder:
    """Makes the next session when it is released."""

    def __init__(self, error: Exception | None = None) -> None:
        self.is_allowed = threading.Event()
        self.is_done = threading.Event()
        self._error = error

    def __call__(self) -> ScoringSession:
        assert self.is_allowed.wait(WAIT_S)
        self.is_done.set()
        if self._error:
            raise self._error
        return ScoringSession("fast", 0.75)


@contextmanager
def start_swap(builder: Builder) -> Iterator[HotSwapSession]:
    session = HotSwapSession(ScoringSession("slow", 0.25), builder)
    try:
        yield session
    finally:
        builder.is_allowed.set()
        session.close()


def run_one(session: HotSwapSession) -> tuple[str, float]:
    return session.backend, float(session.run(PIXELS, SIZES)[0].scores[0])


def test_the_next_session_runs_as_soon_as_it_is_ready() -> None:
    builder = Builder()
    with start_swap(builder) as session:
        assert run_one(session) == ("slow", 0.25)
        builder.is_allowed.set()
        session.wait_ready(WAIT_S)
        assert run_one(session) == ("fast", 0.75)


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (ParityError("golden.npz on tensorrt: outputs differ"), "staying on slow: golden.npz on tensorrt"),
        (RuntimeError("CUDA error: out of memory"), "RuntimeError: CUDA error: out of memory"),
    ],
    ids=["checks fail", "a library fails"],
)
def test_if_the_next_session_fails_the_first_stays(
    error: Exception, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    builder = Builder(error)
    with start_swap(builder) as session:
        builder.is_allowed.set()
        with pytest.raises(type(error), match=str(error)):
            session.wait_ready(WAIT_S)
        assert run_one(session) == ("slow", 0.25)
    assert logged in caplog.text


def test_a_session_that_is_ready_after_closing_is_discarded() -> None:
    builder = Builder()
    with start_swap(builder) as session:
        session.close()
        builder.is_allowed.set()
        assert builder.is_done.wait(WAIT_S)
        for thread in threading.enumerate():
            if thread.name == "hot-swap":
                thread.join(WAIT_S)
        assert run_one(session) == ("slow", 0.25)
