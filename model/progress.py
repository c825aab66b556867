"""Progress of long work: a bar on a terminal, elsewhere a log line every 30 seconds."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 30.0
T = TypeVar("T")


class Progress(AbstractContextManager["Progress"]):
    """A stage of `total` units; `done` of them are from an earlier run."""

    def __init__(self, stage: str, total: int, *, unit: str, done: int = 0, is_shown: bool = True) -> None:
        self._stage = stage
        self._total = total
        self._first = done
        self._done = done
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=stage, unit=unit, disable=None if is_shown else True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count more units as done; `note` is shown next to the bar."""
        self._done += count
        self._bar.update(count)
        self._bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if self._bar.disable and (now - self._logged >= LOG_INTERVAL_S or self._done == self._total):
            self._logged = now
            logger.info("%s: %d of %d, %.0f s left; %s", self._stage, self._done, self._total, self.left_s, note)

    @property
    def left_s(self) -> float:
        """Estimated seconds to the end; infinite at the beginning."""
        done = self._done - self._first
        return (time.monotonic() - self._started) / done * (self._total - self._done) if done else math.inf


def track(items: Sequence[T], stage: str, *, unit: str = "photo") -> Iterator[T]:
    """Iterate over the items with progress."""
    with Progress(stage, len(items), unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
