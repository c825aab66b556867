"""What a version did lately: how long its answers took, and how often it failed where another did not."""

from collections import deque

import numpy as np

KEPT = 200
"""Last pictures that are looked at."""


class Track:
    """To be used on the event loop alone."""

    def __init__(self) -> None:
        self._last: deque[float | None] = deque(maxlen=KEPT)

    @property
    def tried(self) -> int:
        """Pictures that are looked at."""
        return len(self._last)

    @property
    def failures(self) -> int:
        """Those among them that another version had to answer."""
        return sum(seconds is None for seconds in self._last)

    @property
    def p95_s(self) -> float:
        """What 95 of 100 answers took at most, in seconds, from the picture to its segments; 0 if there are none."""
        taken = [seconds for seconds in self._last if seconds is not None]
        return float(np.percentile(taken, 95)) if taken else 0.0

    def take(self, seconds: float) -> None:
        self._last.append(seconds)

    def fail(self) -> None:
        self._last.append(None)

    def clear(self) -> None:
        """Begin anew, in another role."""
        self._last.clear()
