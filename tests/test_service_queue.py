"""Admission, the fair queue, and when a batch runs."""

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from fake_service import RedSession

from model.errors import QueueFull
from service.inference.batch_scheduler import BatchScheduler
from service.inference.queue import BatchQueue, ImageBatch, QueuedImage
from service.metrics import Telemetry
from service.requests import RequestContext
from service.settings import Settings

pytestmark = pytest.mark.anyio


def make_scheduler(capacity: int) -> BatchScheduler:
    session = RedSession()
    return BatchScheduler(session, Settings(max_queue_size=capacity - 1), Telemetry(), lambda: session)


async def hold(scheduler: BatchScheduler, owner: str, priority: int = 2) -> None:
    with scheduler.admit(RequestContext(deadline=0.0, owner=owner, priority=priority)):
        await asyncio.Event().wait()


async def begin(scheduler: BatchScheduler, *owners: str, priority: int = 2) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(hold(scheduler, owner, priority)) for owner in owners]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def see(tasks: list[asyncio.Task[None]]) -> str:
    """One letter each: h holds its slot, B is rejected as busy."""
    return "".join("B" if each.done() and isinstance(each.exception(), QueueFull) else "h" for each in tasks)


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_client_may_hold_all_slots_and_no_more() -> None:
    scheduler = make_scheduler(3)
    tasks = await begin(scheduler, *"aaaa")
    assert see(tasks) == "hhhB"
    await end(tasks[:1])
    more = await begin(scheduler, "a")
    assert see(more) == "h"
    await end(tasks + more)


async def test_a_client_without_a_slot_gets_the_newest_of_the_client_with_most() -> None:
    scheduler = make_scheduler(4)
    tasks = await begin(scheduler, *"aaab")
    tasks += await begin(scheduler, *"c")
    assert see(tasks) == "hhBhh"
    tasks += await begin(scheduler, *"d")
    assert see(tasks) == "hBBhhh"
    tasks += await begin(scheduler, *"bcda")  # each holds one now: none has two more than another
    assert see(tasks) == "hBBhhhBBBB"
    await end(tasks)


async def test_an_urgent_request_takes_the_slot_of_the_least_urgent() -> None:
    scheduler = make_scheduler(2)
    tasks = [*await begin(scheduler, "a", priority=2), *await begin(scheduler, "b", priority=3)]
    tasks += await begin(scheduler, "a", priority=1)
    assert see(tasks) == "hBh"
    tasks += await begin(scheduler, "b", priority=3)
    assert see(tasks) == "hBhB"
    await end(tasks)


SQUARE, WIDE = (3, 2, 2), (3, 2, 4)


def make_item(name: int, owner: str = "", priority: int = 2, shape: tuple[int, int, int] = SQUARE) -> QueuedImage:
    context = RequestContext(deadline=1.0, owner=owner, priority=priority)
    return QueuedImage(pixels=np.full(shape, name, np.uint8), size=(2, 2), context=context, submitted=0.0)


def fill(*items: QueuedImage, **settings: Any) -> BatchQueue:
    queue = BatchQueue(Settings(**{"max_batch_size": 4, "max_queue_delay_ms": 2000.0, **settings}))
    for item in items:
        queue.put(item)
    return queue


def take(queue: BatchQueue, now: float) -> ImageBatch:
    batch = queue.take_batch(now)
    assert isinstance(batch, tuple)
    return batch


def name(items: Iterable[QueuedImage]) -> list[int]:
    return [int(item.pixels.max()) for item in items]


async def test_clients_take_turns_however_many_images_one_has_sent() -> None:
    queue = fill(*(make_item(i, "greedy") for i in range(1, 6)), make_item(6, "modest"), make_item(7, "third"))
    assert name(take(queue, 0.0)[0]) == [1, 6, 7, 2]
    queue.put(make_item(8, "modest"))
    assert name(take(queue, 0.0)[0]) == [3, 8, 4, 5]
    assert len(queue) == 0


async def test_urgent_images_come_first_and_others_fill_the_batch() -> None:
    images = make_item(1, priority=3), make_item(2), make_item(3, priority=1), make_item(4)
    queue = fill(*images, max_batch_size=3)
    assert name(take(queue, 0.0)[0]) == [3, 2, 4]
    assert name(queue) == [1]


SMALL, LARGE = (3, 10, 10), (3, 20, 20)


def wait(
    submitted: float = 0.0, deadline: float = 100.0, priority: int = 2, shape: tuple[int, ...] = SMALL
) -> QueuedImage:
    context = RequestContext(deadline=deadline, priority=priority)
    return QueuedImage(pixels=np.zeros(shape, np.uint8), size=(2, 2), context=context, submitted=submitted)


def describe(batch: ImageBatch) -> tuple[str, int]:
    return batch[1], len(batch[0])


async def test_a_batch_runs_when_its_first_image_has_waited_long_enough() -> None:
    queue = fill(wait(submitted=1.0), wait(submitted=2.5))
    assert queue.take_batch(2.5) == 0.5
    assert describe(take(queue, 3.0)) == ("max_queue_delay", 2)


async def test_a_batch_runs_in_time_for_its_closest_deadline() -> None:
    queue = fill(wait(), wait(deadline=10.0), max_queue_delay_ms=50_000.0)
    queue.record(SMALL, 2.0)
    assert queue.take_batch(6.0) == pytest.approx(1.0)  # one and a half runs before the deadline
    assert describe(take(queue, 7.0)) == ("deadline", 2)


async def test_the_pixel_limit_makes_batches_of_large_inputs_smaller() -> None:
    for shape, limit in ((SMALL, 8), (LARGE, 2), ((3, 50, 50), 1)):
        queue = fill(*(wait(shape=shape) for _ in range(9)), max_batch_size=8, max_batch_pixels=900)
        assert describe(take(queue, 0.0)) == ("max_batch_size", limit)
