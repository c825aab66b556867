"""A bounded number of requests at once, shared fairly among those who ask."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from model.errors import QueueFull
from service.requests import RequestContext
from service.telemetry.metrics import SharedGauge


@dataclass(kw_only=True, eq=False)
class _Slot:
    claim: RequestContext
    task: "asyncio.Task[object] | None"
    is_lost: bool = False


class AdmissionController:
    """Each request holds one from its first byte to its answer; without a bound, bodies would pile up before the queue.

    When all are taken, the newest place of whoever has most goes to a caller who has at least two less (longest queue
    drop), or who is more urgent; else the caller is turned away with what `make_busy` gives.
    """

    def __init__(self, capacity: int, make_busy: Callable[[], QueueFull], gauge: SharedGauge) -> None:
        self._capacity = capacity
        self._gauge = gauge
        self._make_busy = make_busy
        self._taken: list[_Slot] = []

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a place."""
        return not self._taken

    @contextmanager
    def admit(self, claim: RequestContext) -> Iterator[None]:
        """A place for the current task. Raises Busy if there is none, or when it is lost to somebody else."""
        if len(self._taken) >= self._capacity:
            self._free_one(claim)
        place = _Slot(claim=claim, task=asyncio.current_task())
        self._taken.append(place)
        self._gauge.set(len(self._taken))
        try:
            yield
        except asyncio.CancelledError:
            if place.is_lost and place.task and place.task.uncancel() == 0:
                raise self._make_busy() from None
            raise
        finally:
            if not place.is_lost:
                self._taken.remove(place)
            self._gauge.set(len(self._taken))

    def _free_one(self, claim: RequestContext) -> None:
        counts = Counter(place.claim.owner for place in self._taken)
        least = max(place.claim.priority for place in self._taken)
        candidates = [place for place in self._taken if place.claim.priority == least]
        # The last of equals: the newest has cost least so far.
        victim = max(enumerate(candidates), key=lambda each: (counts[each[1].claim.owner], each[0]))[1]
        is_greedy = counts[victim.claim.owner] >= counts[claim.owner] + 2 and claim.priority <= least
        if not is_greedy and claim.priority >= least:
            raise self._make_busy()
        victim.is_lost = True
        self._taken.remove(victim)
        if victim.task:
            victim.task.cancel()
