"""The first session runs until the next is ready, and stays if that fails."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from model.backends.session import HotSwapSession
from model.errors import ParityError

WAIT_S = 10.0


class NamedSession:
    """Outputs its name."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> Any:
        return f"output of {self.backend}"


class Builder:
    """Makes the next session when it is released."""

    def __init__(self, error: Exception | None = None) -> None:
        self.is_allowed = threading.Event()
        self.is_done = threading.Event()
        self._error = error

    def __call__(self) -> NamedSession:
        assert self.is_allowed.wait(WAIT_S)
        self.is_done.set()
        if self._error:
            raise self._error
        return NamedSession("fast")


@contextmanager
def start_swap(builder: Builder) -> Iterator[HotSwapSession]:
    session = HotSwapSession(NamedSession("slow"), builder)
    try:
        yield session
    finally:
        builder.is_allowed.set()
        session.close()


def run_one(session: HotSwapSession) -> tuple[str, Any]:
    return session.backend, session.run(np.zeros((1, 3, 8, 8), np.uint8), np.array([[8, 8]]))


def test_the_next_session_runs_as_soon_as_it_is_ready() -> None:
    builder = Builder()
    with start_swap(builder) as session:
        assert run_one(session) == ("slow", "output of slow")
        builder.is_allowed.set()
        session.wait_ready(WAIT_S)
        assert run_one(session) == ("fast", "output of fast")


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
        assert run_one(session) == ("slow", "output of slow")
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
        assert run_one(session) == ("slow", "output of slow")
