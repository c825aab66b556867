"""Queue of images for the network, fair between clients."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from jaxtyping import UInt8

from model.errors import DeadlineExceeded
from model.network_io import RawOutputs
from service.requests import RequestContext

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """Raw outputs for one image, and their timing."""

    raw: RawOutputs
    queue_s: float
    """Seconds from submission to the start of the run."""
    infer_s: float
    """Seconds of the run, which the images of a batch share."""


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


class FairQueue:
    """Images by input size; within one, by priority, then round robin over the clients."""

    def __init__(self) -> None:
        self._by_shape: dict[Shape, dict[int, dict[str, deque[QueuedImage]]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[QueuedImage]:
        """Iterate over all images; those of one client in the order of submission."""
        return chain.from_iterable(self.list_images(shape) for shape in self.list_shapes())

    def list_shapes(self) -> list[Shape]:
        """Return the input sizes with waiting images."""
        return list(self._by_shape)

    def list_images(self, shape: Shape) -> list[QueuedImage]:
        """Return the images that wait in one input size."""
        levels = self._by_shape[shape].values()
        return list(chain.from_iterable(images for owners in levels for images in owners.values()))

    def count_ahead(self, context: RequestContext) -> int:
        """Return how many images would run before a new one of this client."""
        ahead = 0
        for levels in self._by_shape.values():
            for priority, owners in levels.items():
                if priority < context.priority:
                    ahead += sum(map(len, owners.values()))
                elif priority == context.priority:
                    own = len(owners.get(context.owner, ()))
                    others = (len(images) for owner, images in owners.items() if owner != context.owner)
                    ahead += own + sum(min(count, own + 1) for count in others)
        return ahead

    def put(self, image: QueuedImage) -> None:
        owners = self._by_shape.setdefault(image.pixels.shape, {}).setdefault(image.context.priority, {})
        owners.setdefault(image.context.owner, deque()).append(image)
        self._length += 1

    def take(self, shape: Shape, max_images: int) -> list[QueuedImage]:
        """Remove and return up to `max_images` of an input size; a served client goes behind the others."""
        return list(islice(self._pop_images(shape), max_images))

    def discard(self, image: QueuedImage) -> None:
        """Remove an image if it is still in the queue."""
        owners = self._by_shape.get(image.pixels.shape, {}).get(image.context.priority, {})
        if image in (images := owners.get(image.context.owner, deque())):
            images.remove(image)
            self._length -= 1
            self._remove_empty(image)

    def _pop_images(self, shape: Shape) -> Iterator[QueuedImage]:
        while levels := self._by_shape.get(shape):
            owners = levels[min(levels)]
            owner = next(iter(owners))
            images = owners.pop(owner)
            image = images.popleft()
            self._length -= 1
            owners[owner] = images  # behind the others now
            self._remove_empty(image)
            yield image

    def _remove_empty(self, image: QueuedImage) -> None:
        """Remove the entries that held only this image."""
        shape, priority, owner = image.pixels.shape, image.context.priority, image.context.owner
        levels = self._by_shape[shape]
        if not levels[priority][owner]:
            del levels[priority][owner]
        if not levels[priority]:
            del levels[priority]
        if not levels:
            del self._by_shape[shape]


def make_deadline_error() -> DeadlineExceeded:
    """Return the error of an image whose result is not ready in time."""
    return DeadlineExceeded("the image was not segmented within the timeout: send fewer at once, or try again")
