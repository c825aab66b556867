"""Decides when a batch runs and which images are in it."""

from dataclasses import dataclass

from service.inference.queue import FairQueue, QueuedImage, Shape
from service.telemetry.metrics import ReleaseReason

_INITIAL_RUN_S = 0.5
"""Assumed duration of a run before one was measured."""
_SMOOTHING = 0.8
"""Weight of earlier runs in the mean duration."""
_DEADLINE_FACTOR = 1.5
"""A batch runs when its closest deadline is this many mean runs away."""
_RECOVERY_RUNS = 100
"""Successful runs after which an input size that was short of memory may have larger batches again."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one input size that run together."""

    images: list[QueuedImage]
    reason: ReleaseReason

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width with padding."""
        height, width = self.images[0].pixels.shape[-2:]
        return height, width


class BatchPolicy:
    """Runs a batch when it is full, has waited long enough, or a deadline is close; each has one input size."""

    def __init__(self, *, max_batch_size: int, max_queue_delay_s: float, max_batch_pixels: int) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_delay_s = max_queue_delay_s
        self._max_batch_pixels = max_batch_pixels
        self._run_s = _INITIAL_RUN_S
        self._reduced: dict[Shape, tuple[int, int]] = {}
        """Maximum batch size of input sizes that were short of memory, and successful runs since."""
        self.is_measured = False
        """Whether the duration of a run has been measured."""
        self.is_draining = False
        """Run batches without waiting for more images."""

    def batch_limit(self, shape: Shape) -> int:
        """Return the maximum batch size of an input size: by the setting, its pixels, and the memory it took."""
        by_pixels = max(1, self._max_batch_pixels // (shape[-1] * shape[-2]))
        by_memory, _ = self._reduced.get(shape, (self._max_batch_size, 0))
        return min(self._max_batch_size, by_pixels, by_memory)

    def choose(self, queue: FairQueue, now: float) -> ImageBatch | float | None:
        """Take the next batch from the queue; else return the seconds until one is due; None if the queue is empty."""
        due: list[tuple[tuple[int, float], Shape, ReleaseReason]] = []
        next_due_s: float | None = None
        for shape in queue.list_shapes():
            images = queue.list_images(shape)
            oldest = min(image.submitted for image in images)
            deadline = min(image.context.deadline for image in images)
            reason, wait_s = self._release(shape, len(images), now - oldest, deadline - now)
            if reason:
                due.append(((min(image.context.priority for image in images), oldest), shape, reason))
            next_due_s = wait_s if next_due_s is None else min(next_due_s, wait_s)
        if not due:
            return next_due_s
        _, shape, reason = min(due)
        return ImageBatch(images=queue.take(shape, self.batch_limit(shape)), reason=reason)

    def estimate_wait(self, images: int) -> float:
        """Return the seconds that this many images will take."""
        return -(-images // self._max_batch_size) * self._run_s

    def record(self, shape: Shape, run_s: float) -> None:
        """Record a successful run."""
        self._run_s = _SMOOTHING * self._run_s + (1 - _SMOOTHING) * run_s if self.is_measured else run_s
        self.is_measured = True
        if shape in self._reduced:
            limit, runs = self._reduced[shape]
            self._reduced[shape] = (limit, runs + 1) if runs + 1 < _RECOVERY_RUNS else (2 * limit, 0)
            if self._reduced[shape][0] >= self._max_batch_size:
                del self._reduced[shape]

    def halve_limit(self, shape: Shape, count: int) -> None:
        """Halve the maximum batch size of an input size: there was not enough memory for `count` images."""
        self._reduced[shape] = (max(1, count // 2), 0)

    def _release(
        self, shape: Shape, count: int, age_s: float, time_left_s: float
    ) -> tuple[ReleaseReason | None, float]:
        """Return why a batch of this input size runs now, else None and the seconds until it will."""
        delay_s = self._max_queue_delay_s - age_s
        slack_s = time_left_s - _DEADLINE_FACTOR * self._run_s
        if count >= self.batch_limit(shape):
            return "max_batch_size", 0.0
        if self.is_draining:
            return "shutdown", 0.0
        if delay_s <= 0.0:
            return "max_queue_delay", 0.0
        if slack_s <= 0.0:
            return "deadline", 0.0
        return None, min(delay_s, slack_s)
