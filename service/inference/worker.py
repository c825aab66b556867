"""A thread that runs the network, and whose death is noticed."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from model.errors import InferenceError

logger = logging.getLogger(__name__)

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
        if not self._thread.is_alive():
            raise InferenceThreadDied("the inference thread has ended")
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
