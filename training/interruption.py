"""Ctrl-C between steps and not within one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.is_wished = False

    def note(self, _signal: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.is_wished = True


@contextmanager
def hold_interrupts() -> Iterator[Interruption]:
    """Ctrl-C only sets `is_wished` until the block ends; main thread only."""
    interruption = Interruption()
    previous = signal.signal(signal.SIGINT, interruption.note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
