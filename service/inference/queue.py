"""Pictures that wait for the network, in an order that is fair to those who sent them."""

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
    """A raw answer, and what it took."""

    raw: RawOutputs
    queue_s: float
    """From submission until its run began."""
    infer_s: float
    """Length of the run, shared with the rest of the batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QueuedImage:
    """A picture on its canvas, and who waits for the answer."""

    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]
    """Height and width of the picture at the top left of its canvas."""
    claim: RequestContext
    submitted: float
    begin: Callable[[], None] = lambda: None
    """Called when its run begins."""
    future: asyncio.Future[InferenceResult] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def finish(self, inference: InferenceResult) -> None:
        if not self.future.done():
            self.future.set_result(inference)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # counts as retrieved, so that asyncio does not complain where the caller is gone


class FairQueue:
    """Items by canvas; among those of one canvas the urgent go first, among equals the owners take turns."""

    def __init__(self) -> None:
        self._canvases: dict[Shape, dict[int, dict[str, deque[QueuedImage]]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[QueuedImage]:
        """All items, those of one owner in the order they came."""
        return chain.from_iterable(self.list_items(shape) for shape in self.list_shapes())

    def list_shapes(self) -> list[Shape]:
        """The canvases that somebody waits for."""
        return list(self._canvases)

    def list_items(self, shape: Shape) -> list[QueuedImage]:
        """What waits for a canvas."""
        levels = self._canvases[shape].values()
        return list(chain.from_iterable(line for owners in levels for line in owners.values()))

    def count_ahead(self, claim: RequestContext) -> int:
        """How many would be taken before a new item of this claim, as far as is known now."""
        ahead = 0
        for levels in self._canvases.values():
            for priority, owners in levels.items():
                if priority < claim.priority:
                    ahead += sum(map(len, owners.values()))
                elif priority == claim.priority:
                    own = len(owners.get(claim.owner, ()))
                    others = (len(line) for owner, line in owners.items() if owner != claim.owner)
                    ahead += own + sum(min(count, own + 1) for count in others)
        return ahead

    def put(self, item: QueuedImage) -> None:
        owners = self._canvases.setdefault(item.pixels.shape, {}).setdefault(item.claim.priority, {})
        owners.setdefault(item.claim.owner, deque()).append(item)
        self._length += 1

    def take(self, shape: Shape, most: int) -> list[QueuedImage]:
        """Up to `most` items of a canvas, which leave the queue; an owner who was served goes behind the others."""
        return list(islice(self._draw(shape), most))

    def discard(self, item: QueuedImage) -> None:
        """Take an item out, if it is still in."""
        owners = self._canvases.get(item.pixels.shape, {}).get(item.claim.priority, {})
        if item in (line := owners.get(item.claim.owner, deque())):
            line.remove(item)
            self._length -= 1
            self._tidy(item)

    def _draw(self, shape: Shape) -> Iterator[QueuedImage]:
        while levels := self._canvases.get(shape):
            owners = levels[min(levels)]
            owner = next(iter(owners))
            line = owners.pop(owner)
            item = line.popleft()
            self._length -= 1
            owners[owner] = line  # behind the others now
            self._tidy(item)
            yield item

    def _tidy(self, item: QueuedImage) -> None:
        """Forget the lines that have become empty."""
        shape, priority, owner = item.pixels.shape, item.claim.priority, item.claim.owner
        levels = self._canvases[shape]
        if not levels[priority][owner]:
            del levels[priority][owner]
        if not levels[priority]:
            del levels[priority]
        if not levels:
            del self._canvases[shape]


def make_deadline_error() -> DeadlineExceeded:
    """The error of a picture that was not answered in time."""
    return DeadlineExceeded("the picture was not answered within its time limit: send fewer at once, or try again")
