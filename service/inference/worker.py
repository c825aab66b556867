"""A thread that computes, and whose death is noticed."""

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
    """A thread that ended, or did not come back from a call; the service starts another."""


class InferenceThread:
    """One thread, one call after the other.

    Not an executor, whose threads hold up the end of the process: a thread that hangs in a driver must not.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T], limit_s: float | None = None) -> T:
        """Return what the call returns or raises; raise InferenceThreadDied if it does not return within `limit_s`."""
        if not self._thread.is_alive():
            raise InferenceThreadDied("the thread of the network has ended")
        future: Future[T] = Future()
        self._calls.put((call, future))
        waiting = asyncio.wrap_future(future)
        await asyncio.wait({waiting}, timeout=limit_s)
        if not waiting.done():
            waiting.cancel()
            raise InferenceThreadDied(f"the network did not come back within {limit_s:g} s")
        return waiting.result()

    async def stop(self, limit_s: float) -> None:
        """End after the calls that were made; a thread that takes longer is left behind."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, limit_s)
        if self._thread.is_alive():
            logger.warning("left a thread behind that has not come back for %g s", limit_s)

    def abandon(self) -> None:
        """Let it end whenever it comes back."""
        self._calls.put(None)

    def _work(self) -> None:
        while (order := self._calls.get()) is not None:
            call, future = order
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:  # a session may raise anything
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(InferenceThreadDied(f"the thread of the network ended: {type(error).__name__}"))
                return
            del order, call, future  # or a batch stays in memory until the next one comes
