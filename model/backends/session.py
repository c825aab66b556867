"""The protocol of all backends, and a session that switches to a faster backend when it is ready."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int64, UInt8

from model.contract import RawOutputs
from model.errors import UsegError

logger = logging.getLogger(__name__)

ConcreteBackend = Literal["cpu", "openvino", "openvino-int8", "cuda", "tensorrt", "torch"]
"""ONNX Runtime on the CPU, OpenVINO on the CPU, also in int8, ONNX Runtime with CUDA or TensorRT, torch on a GPU or the
CPU."""
Backend = Literal["auto", ConcreteBackend]
"""auto: the fastest backend that this machine has and that reproduces the golden outputs."""


class Session(Protocol):
    """Runs a network."""

    @property
    def backend(self) -> str:
        """The backend in use, which can differ from the requested one."""
        ...

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        """Return the outputs for each image, in order; they do not depend on the rest of the batch.

        Images of `sizes` (height, width) are at the top left of `pixels`, which have one of the contract's input sizes.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AutoSession:
    """The session that backend "auto" chose."""

    session: Session
    skipped_backends: Mapping[str, str]
    """Why each faster backend was not chosen."""

    @property
    def backend(self) -> str:
        return self.session.backend

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        return self.session.run(pixels, sizes)


def find_hot_swap(session: Session | None) -> "HotSwapSession | None":
    """Return the session that may still switch to a faster backend, if this is one or contains one."""
    inner = session.session if isinstance(session, AutoSession) else session
    return inner if isinstance(inner, HotSwapSession) else None


class HotSwapSession:
    """Runs on `first` until `make_next` has returned another session, then on that one.

    `make_next` is called once, on a thread of its own. If it raises, `first` stays. A run finishes on the session it
    started on.
    """

    def __init__(self, first: Session, make_next: Callable[[], Session]) -> None:
        self._current = first
        self._next: Future[Session] = Future()
        # A daemon thread: a build of minutes that cannot be interrupted must not keep the process alive.
        threading.Thread(target=self._switch, args=(make_next,), name="hot-swap", daemon=True).start()

    @property
    def backend(self) -> str:
        """The backend that the next run would use."""
        return self._current.backend

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        return self._current.run(pixels, sizes)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the switch has succeeded. Raises the error of a failure, CancelledError if this is closed."""
        self._next.result(timeout_s)

    def close(self) -> None:
        """Do not switch any more; a session that is still being made is discarded."""
        self._next.cancel()

    def _switch(self, make_next: Callable[[], Session]) -> None:
        try:
            session = make_next()
        except Exception as error:  # a backend can raise anything, and the first session still works
            trace = None if isinstance(error, UsegError) else error
            logger.error(
                "could not switch to the faster backend, staying on %s: %s", self.backend, error, exc_info=trace
            )
            if self._next.set_running_or_notify_cancel():
                self._next.set_exception(error)
        else:
            if self._next.set_running_or_notify_cancel():
                logger.info("switching from %s to %s", self._current.backend, session.backend)
                self._current = session
                self._next.set_result(session)
