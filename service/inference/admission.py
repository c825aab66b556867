"""Admission control: a bounded number of requests at once, shared fairly among clients."""

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
    context: RequestContext
    task: "asyncio.Task[object] | None"
    is_revoked: bool = False


class AdmissionController:
    """Each request holds a slot from its headers to its response, so that bodies cannot pile up before the queue.

    If all slots are taken, a new request gets the slot of a less urgent request, or the newest slot of the client that
    has most, if that has at least two more than its own client (longest queue drop). Else it is rejected.
    """

    def __init__(
        self,
        capacity: int,
        check_wait: Callable[[RequestContext], None],
        make_queue_full: Callable[[], QueueFull],
        gauge: SharedGauge,
    ) -> None:
        """`check_wait` raises QueueFull for a request that would wait too long; `make_queue_full` makes that error."""
        self._capacity = capacity
        self._check_wait = check_wait
        self._make_queue_full = make_queue_full
        self._gauge = gauge
        self._slots: list[_Slot] = []

    @property
    def is_empty(self) -> bool:
        """Whether no request holds a slot."""
        return not self._slots

    @contextmanager
    def admit(self, context: RequestContext) -> Iterator[None]:
        """Hold a slot for the current task. Raises QueueFull if there is none, or when it is revoked."""
        self._check_wait(context)
        if len(self._slots) >= self._capacity:
            self._revoke_slot(context)
        slot = _Slot(context=context, task=asyncio.current_task())
        self._slots.append(slot)
        self._gauge.set(len(self._slots))
        try:
            yield
        except asyncio.CancelledError:
            if slot.is_revoked and slot.task and slot.task.uncancel() == 0:
                raise self._make_queue_full() from None
            raise
        finally:
            if not slot.is_revoked:
                self._slots.remove(slot)
            self._gauge.set(len(self._slots))

    def _revoke_slot(self, context: RequestContext) -> None:
        counts = Counter(slot.context.owner for slot in self._slots)
        lowest = max(slot.context.priority for slot in self._slots)
        candidates = [slot for slot in self._slots if slot.context.priority == lowest]
        # Among equals the last one: the newest request has cost least so far.
        victim = max(enumerate(candidates), key=lambda each: (counts[each[1].context.owner], each[0]))[1]
        has_more = counts[victim.context.owner] >= counts[context.owner] + 2 and context.priority <= lowest
        if not has_more and context.priority >= lowest:
            raise self._make_queue_full()
        victim.is_revoked = True
        self._slots.remove(victim)
        if victim.task:
            victim.task.cancel()
