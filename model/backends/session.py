"""The protocol of all backends, and a session that switches to a faster backend when it is ready."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int64, UInt8

from model.errors import UsegError
from model.network_io import RawOutputs

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


logger = logging.getLogger(__name__)


class HotSwapSession:
    """Runs on `first` until `make_next` has returned another session, then on that one.

    `make_next` is called once, on a thread of its own. If it raises, `first` stays. A run finishes on the session it
    started on.
    """

    def __init__(self, first: Session, make_next: Callable[[], Session]) -> None:
        self._current = first
        self._make_next = make_next
        self._failure: Exception | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._is_ready = threading.Event()
        # A daemon thread: a build of minutes that cannot be interrupted must not keep the process alive.
        threading.Thread(target=self._switch, name="hot-swap", daemon=True).start()

    @property
    def backend(self) -> str:
        """The backend that the next run would use."""
        return self._current.backend

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        return self._current.run(pixels, sizes)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the switch has succeeded, failed or `timeout_s` has passed. Raises the error of a failure."""
        self._is_ready.wait(timeout_s)
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Do not switch any more; a session that is still being made is discarded."""
        with self._lock:
            self._is_closed = True
        self._is_ready.set()

    def _switch(self) -> None:
        try:
            session = self._make_next()
        except UsegError as error:
            logger.error("could not switch to the faster backend, staying on %s: %s", self.backend, error)
            self._failure = error
        except Exception as error:  # a backend can raise anything, and the first session still works
            logger.exception("could not switch to the faster backend, staying on %s", self.backend)
            self._failure = error
        else:
            with self._lock:
                if not self._is_closed:
                    logger.info("switching from %s to %s", self._current.backend, session.backend)
                    self._current = session
        self._is_ready.set()
