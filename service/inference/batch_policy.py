"""When a batch goes, and what is in it."""

from dataclasses import dataclass

from service.inference.queue import FairQueue, QueuedImage, Shape
from service.telemetry.metrics import ReleaseReason

_INITIAL_RUN_S = 0.5
"""Taken for the length of a run until one was measured."""
_SMOOTHING = 0.8
"""Weight of the past in the mean length of a run."""
_DEADLINE_FACTOR = 1.5
"""A batch goes when its most pressing deadline is as many mean runs away."""
_RECOVERY_RUNS = 100
"""Runs without trouble after which a canvas that was short of memory may have a larger batch again."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Items of one canvas that run together."""

    items: list[QueuedImage]
    reason: ReleaseReason

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of what its pictures lie on."""
        height, width = self.items[0].pixels.shape[-2:]
        return height, width


class BatchPolicy:
    """The plain rule: size, delay or deadline, whichever comes first; one canvas to a batch."""

    def __init__(self, *, max_batch_size: int, max_wait_s: float, limit_pixels: int) -> None:
        self._max_batch = max_batch_size
        self._max_wait_s = max_wait_s
        self._limit_pixels = limit_pixels
        self._run_s = _INITIAL_RUN_S
        self._shrunk: dict[Shape, tuple[int, int]] = {}
        self.is_measured = False
        """Whether the length of a run is known, or still a guess."""
        self.is_draining = False
        """Nobody else will come, so nothing is waited for."""

    def count_places(self, shape: Shape) -> int:
        """Most pictures of a canvas in one batch: the setting, what the pixel budget allows, what memory showed."""
        affordable = max(1, self._limit_pixels // (shape[-1] * shape[-2]))
        remembered, _ = self._shrunk.get(shape, (self._max_batch, 0))
        return min(self._max_batch, affordable, remembered)

    def choose(self, queue: FairQueue, now: float) -> ImageBatch | float | None:
        """The next batch, taken out of the queue; else in how many seconds to ask again; None if nothing waits."""
        ready: list[tuple[tuple[int, float], Shape, ReleaseReason]] = []
        soonest: float | None = None
        for shape in queue.list_shapes():
            items = queue.list_items(shape)
            oldest = min(item.submitted for item in items)
            pressing = min(item.claim.deadline for item in items)
            reason, wait_s = self._judge(shape, len(items), oldest - now, pressing - now)
            if reason:
                ready.append(((min(item.claim.priority for item in items), oldest), shape, reason))
            soonest = wait_s if soonest is None else min(soonest, wait_s)
        if not ready:
            return soonest
        _, shape, reason = min(ready)
        return ImageBatch(items=queue.take(shape, self.count_places(shape)), reason=reason)

    def estimate_s(self, ahead: int) -> float:
        """How long as many pictures will take."""
        return -(-ahead // self._max_batch) * self._run_s

    def learn(self, shape: Shape, run_s: float) -> None:
        """Take note of a run that went well."""
        self._run_s = _SMOOTHING * self._run_s + (1 - _SMOOTHING) * run_s if self.is_measured else run_s
        self.is_measured = True
        if shape in self._shrunk:
            places, runs = self._shrunk[shape]
            self._shrunk[shape] = (places, runs + 1) if runs + 1 < _RECOVERY_RUNS else (2 * places, 0)
            if self._shrunk[shape][0] >= self._max_batch:
                del self._shrunk[shape]

    def shrink(self, shape: Shape, count: int) -> None:
        """Take note that memory did not suffice for as many pictures: half as many go from now on."""
        self._shrunk[shape] = (max(1, count // 2), 0)

    def _judge(self, shape: Shape, count: int, age_s: float, left_s: float) -> tuple[ReleaseReason | None, float]:
        """Why a batch of the canvas goes now; and in how many seconds it will. `age_s` counts below zero."""
        delay_s = age_s + self._max_wait_s
        haste_s = left_s - _DEADLINE_FACTOR * self._run_s
        if count >= self.count_places(shape):
            return "max_batch_size", 0.0
        if self.is_draining:
            return "shutdown", 0.0
        if delay_s <= 0.0:
            return "max_queue_delay", 0.0
        if haste_s <= 0.0:
            return "deadline", 0.0
        return None, min(delay_s, haste_s)
