"""What runs a network: one protocol for every backend."""

import logging
import threading
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Int64, UInt8

from model.errors import UsegError
from model.network_io import RawOutputs

Backend = Literal["cpu", "openvino", "cuda", "tensorrt", "torch"]
"""ONNX Runtime on a CPU, OpenVINO on a CPU, ONNX Runtime with CUDA or with TensorRT; torch on whatever it finds."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class Session(Protocol):
    """Something that runs a network."""

    @property
    def backend(self) -> str:
        """What answers now, which need not be what was asked for."""
        ...

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        """One answer a picture, in order; each is the same alone and in any batch.

        Pictures of `sizes` (height, width) lie at the top left of their pixels, which are one of the contract's
        canvases.
        """
        ...


logger = logging.getLogger(__name__)


class HotSwapSession:
    """Answers from `first` until `make_next` gave another session, and from that one afterwards.

    `make_next` is called once, on a thread of its own, and raises if its session is not to be trusted; then `first`
    stays. Runs that have begun end where they began.
    """

    def __init__(self, first: Session, make_next: Callable[[], Session]) -> None:
        self._current = first
        self._make_next = make_next
        self._failure: Exception | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._is_settled = threading.Event()
        # A daemon: a build of minutes that cannot be interrupted must not keep the process from ending.
        threading.Thread(target=self._take_over, name="handover", daemon=True).start()

    @property
    def backend(self) -> str:
        """That of the session which would answer now."""
        return self._current.backend

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        return self._current.run(pixels, sizes)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return once the next session answers, or none will or the time is over. Raises what kept it from it."""
        self._is_settled.wait(timeout_s)
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """No handover from now on; a next session that is still being made is dropped when it is ready."""
        with self._lock:
            self._is_closed = True
        self._is_settled.set()

    def _take_over(self) -> None:
        try:
            following = self._make_next()
        except UsegError as error:
            logger.error("%s goes on alone: %s", self.backend, error)
            self._failure = error
        except Exception as error:  # a backend may raise anything; the first session still answers
            logger.exception("%s goes on alone", self.backend)
            self._failure = error
        else:
            with self._lock:
                if not self._is_closed:
                    logger.info("%s hands over to %s", self._current.backend, following.backend)
                    self._current = following
        self._is_settled.set()
