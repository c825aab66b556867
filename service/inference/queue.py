"""The queue of images, and the policy that makes batches of them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from jaxtyping import UInt8

from model.contract import RawOutputs
from model.errors import DeadlineExceeded
from service.metrics import ReleaseReason
from service.requests import RequestContext
from service.settings import Settings

Shape = tuple[int, ...]
InferenceResult = tuple[RawOutputs, float]
"""Raw outputs for one image, and the seconds of the run, which the images of a batch share."""

_INITIAL_RUN_S = 0.5
"""Assumed duration of a run before one was measured."""
_SMOOTHING = 0.8
"""Weight of earlier runs in the mean duration."""
_DEADLINE_FACTOR = 1.5
"""A batch runs when its closest deadline is this many mean runs away."""
_RECOVERY_RUNS = 100
"""Successful runs after which an input size that was short of memory may have larger batches again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QueuedImage:
    """An image in the queue."""

    pixels: UInt8[np.ndarray, "3 H W"]
    """Padded to an input size of the network."""
    size: tuple[int, int]
    """Height and width of the image, at the top left of `pixels`."""
    context: RequestContext
    submitted: float
    """Time of submission on the event loop's clock."""
    on_start: Callable[[], None] = lambda: None
    """Called when its run starts."""
    future: asyncio.Future[InferenceResult] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def finish(self, result: InferenceResult) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # mark it as retrieved: asyncio warns if the client has disconnected


def make_deadline_error() -> DeadlineExceeded:
    """Return the error of an image whose result is not ready in time."""
    return DeadlineExceeded("the image was not segmented within the timeout: send fewer at once, or try again")


ImageBatch = tuple[list[QueuedImage], ReleaseReason]
"""Images of one input size that run together, and why they do now."""


class BatchQueue:
    """The images that wait, and when a batch runs: if it is full, has waited long enough, or a deadline is close.

    A batch has one input size. Images come by priority, then round robin over the clients.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._images: list[QueuedImage] = []
        self._turns: dict[str, int] = {}
        """Place of each waiting client in the round."""
        self._next_turn = count()
        self._run_s = _INITIAL_RUN_S
        self._reduced: dict[Shape, tuple[int, int]] = {}
        """Maximum batch size of input sizes that were short of memory, and successful runs since."""
        self.is_measured = False
        """Whether the duration of a run has been measured."""
        self.is_draining = False
        """Run batches without waiting for more images."""

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[QueuedImage]:
        """Iterate over all images, in the order of submission."""
        return iter(self._images)

    def count_ahead(self, context: RequestContext) -> int:
        """Return how many images would run before a new one of this client."""
        urgent = sum(image.context.priority < context.priority for image in self._images)
        equal = Counter(image.context.owner for image in self._images if image.context.priority == context.priority)
        own = equal.pop(context.owner, 0)
        return urgent + own + sum(min(number, own + 1) for number in equal.values())

    def estimate_wait(self, images: int) -> float:
        """Return the seconds that this many images will take."""
        return -(-images // (self._settings.max_batch_size * self._settings.streams)) * self._run_s

    def put(self, image: QueuedImage) -> None:
        self._images.append(image)
        self._turns.setdefault(image.context.owner, next(self._next_turn))

    def discard(self, image: QueuedImage) -> None:
        """Remove an image if it is still in the queue."""
        if image in self._images:
            self._images.remove(image)
            owner = image.context.owner
            if not any(each.context.owner == owner for each in self._images):
                del self._turns[owner]

    def take_batch(self, now: float) -> ImageBatch | float | None:
        """Remove and return the next batch; else return the seconds until one is due; None if the queue is empty."""
        due: list[tuple[tuple[int, float], Shape, ReleaseReason]] = []
        next_due_s: float | None = None
        for shape in {image.pixels.shape for image in self._images}:
            images = [image for image in self._images if image.pixels.shape == shape]
            oldest = min(image.submitted for image in images)
            deadline = min(image.context.deadline for image in images)
            reason, wait_s = self._release(shape, len(images), now - oldest, deadline - now)
            if reason:
                due.append(((min(image.context.priority for image in images), oldest), shape, reason))
            next_due_s = wait_s if next_due_s is None else min(next_due_s, wait_s)
        if not due:
            return next_due_s
        _, shape, reason = min(due)
        return self._take(shape), reason

    def record(self, shape: Shape, run_s: float) -> None:
        """Record a successful run."""
        self._run_s = _SMOOTHING * self._run_s + (1 - _SMOOTHING) * run_s if self.is_measured else run_s
        self.is_measured = True
        if shape in self._reduced:
            limit, runs = self._reduced[shape]
            self._reduced[shape] = (limit, runs + 1) if runs + 1 < _RECOVERY_RUNS else (2 * limit, 0)
            if self._reduced[shape][0] >= self._settings.max_batch_size:
                del self._reduced[shape]

    def halve_limit(self, shape: Shape, count: int) -> None:
        """Halve the maximum batch size of an input size: there was not enough memory for `count` images."""
        self._reduced[shape] = (max(1, count // 2), 0)

    def _limit(self, shape: Shape) -> int:
        """Return the maximum batch size of an input size: by the setting, its pixels, and the memory it took."""
        by_pixels = max(1, self._settings.max_batch_pixels // (shape[-1] * shape[-2]))
        by_memory, _ = self._reduced.get(shape, (self._settings.max_batch_size, 0))
        return min(self._settings.max_batch_size, by_pixels, by_memory)

    def _take(self, shape: Shape) -> list[QueuedImage]:
        """Remove and return the next images of an input size; a served client goes behind the others."""
        taken: list[QueuedImage] = []
        waiting = [image for image in self._images if image.pixels.shape == shape]
        while waiting and len(taken) < self._limit(shape):
            image = min(waiting, key=lambda each: (each.context.priority, self._turns[each.context.owner]))
            taken.append(image)
            waiting.remove(image)
            self.discard(image)
            if image.context.owner in self._turns:
                self._turns[image.context.owner] = next(self._next_turn)
        return taken

    def _release(
        self, shape: Shape, count: int, age_s: float, time_left_s: float
    ) -> tuple[ReleaseReason | None, float]:
        """Return why a batch of this input size runs now, else None and the seconds until it will."""
        delay_s = self._settings.max_queue_delay_ms / 1000 - age_s
        slack_s = time_left_s - _DEADLINE_FACTOR * self._run_s
        if count >= self._limit(shape):
            return "max_batch_size", 0.0
        if self.is_draining:
            return "shutdown", 0.0
        if delay_s <= 0.0:
            return "max_queue_delay", 0.0
        if slack_s <= 0.0:
            return "deadline", 0.0
        return None, min(delay_s, slack_s)
