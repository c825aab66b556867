"""The queue is fair between clients, orders by priority, and keeps input sizes apart."""

import asyncio

import numpy as np
import pytest

from service.inference.queue import FairQueue, QueuedImage
from service.requests import RequestContext

pytestmark = pytest.mark.anyio
SQUARE, WIDE = (3, 2, 2), (3, 2, 4)


def make_item(name: int, owner: str = "", priority: int = 2, shape: tuple[int, int, int] = SQUARE) -> QueuedImage:
    context = RequestContext(deadline=1.0, owner=owner, priority=priority)
    return QueuedImage(pixels=np.full(shape, name, np.uint8), size=(2, 2), context=context, submitted=0.0)


def fill(*items: QueuedImage) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.put(item)
    return queue


def name(items: list[QueuedImage]) -> list[int]:
    return [int(item.pixels.max()) for item in items]


async def test_clients_take_turns_however_many_images_one_has_sent() -> None:
    queue = fill(*(make_item(i, "greedy") for i in range(1, 6)), make_item(6, "modest"), make_item(7, "third"))
    assert name(queue.take(SQUARE, 4)) == [1, 6, 7, 2]
    queue.put(make_item(8, "modest"))
    assert name(queue.take(SQUARE, 9)) == [3, 8, 4, 5]
    assert (len(queue), queue.list_shapes()) == (0, [])


async def test_urgent_images_come_first_and_others_fill_the_batch() -> None:
    queue = fill(make_item(1, priority=3), make_item(2), make_item(3, priority=1), make_item(4))
    assert name(queue.take(SQUARE, 3)) == [3, 2, 4]
    assert name(list(queue)) == [1]


async def test_input_sizes_are_kept_apart() -> None:
    queue = fill(make_item(1), make_item(2, shape=WIDE), make_item(3))
    assert queue.list_shapes() == [SQUARE, WIDE]
    assert name(queue.take(WIDE, 8)) == [2]
    assert name(queue.take(WIDE, 8)) == []
    assert len(queue) == 2


async def test_a_discarded_image_loses_its_turn() -> None:
    items = [make_item(1, "a"), make_item(2, "b"), make_item(3, "a")]
    queue = fill(*items)
    queue.discard(items[1])
    queue.discard(items[1])
    assert (len(queue), name(queue.take(SQUARE, 3))) == (2, [1, 3])
    queue.discard(items[0])
    assert len(queue) == 0


async def test_the_images_ahead_depend_on_client_and_priority() -> None:
    queue = fill(*(make_item(i, "greedy") for i in range(5)), make_item(6, "modest"), make_item(7, "a", priority=1))

    def count(owner: str, priority: int = 2) -> int:
        return queue.count_ahead(RequestContext(deadline=1.0, owner=owner, priority=priority))

    assert count("greedy") == 7  # all: five of its own, the one of modest, the urgent one
    assert count("modest") == 4  # the urgent one, its own, and two turns of greedy
    assert count("new") == 3
    assert (count("new", 1), count("a", 1), count("new", 3)) == (1, 1, 7)


async def test_random_operations_lose_no_image_and_return_none_twice() -> None:
    rng = np.random.default_rng(0)
    queue, waiting, served = FairQueue(), [], []
    for step in range(2_000):
        item = make_item(step % 250, str(rng.integers(4)), int(rng.integers(1, 4)), (SQUARE, WIDE)[rng.integers(2)])
        queue.put(item)
        waiting.append(item)
        if rng.random() < 0.3:
            gone = waiting.pop(rng.integers(len(waiting)))
            queue.discard(gone)
        if rng.random() < 0.4:
            for each in queue.take((SQUARE, WIDE)[rng.integers(2)], int(rng.integers(1, 5))):
                waiting.remove(each)
                served.append(each)
        assert len(queue) == len(waiting)
    assert {id(each) for each in queue} == {id(each) for each in waiting}
    assert len({id(each) for each in served}) == len(served)
    await asyncio.sleep(0)
