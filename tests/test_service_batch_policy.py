"""A batch goes when it is full, has waited, is pressed by a deadline, or the end is near; and says which."""

import numpy as np
import pytest

from service.inference.batch_policy import BatchPolicy, ImageBatch
from service.inference.queue import FairQueue, QueuedImage
from service.requests import RequestContext

pytestmark = pytest.mark.anyio
SMALL, LARGE = (3, 10, 10), (3, 20, 20)


def wait(
    submitted: float = 0.0, deadline: float = 100.0, priority: int = 2, shape: tuple[int, ...] = SMALL
) -> QueuedImage:
    claim = RequestContext(deadline=deadline, priority=priority)
    return QueuedImage(pixels=np.zeros(shape, np.uint8), size=(2, 2), claim=claim, submitted=submitted)


def fill(*items: QueuedImage) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.put(item)
    return queue


def make_batcher(max_batch_size: int = 4, max_wait_s: float = 2.0, limit_pixels: int = 10_000) -> BatchPolicy:
    return BatchPolicy(max_batch_size=max_batch_size, max_wait_s=max_wait_s, limit_pixels=limit_pixels)


def describe(choice: ImageBatch | float | None) -> tuple[str, int]:
    assert isinstance(choice, ImageBatch)
    return choice.reason, len(choice.items)


async def test_nothing_waiting_is_nothing_to_look_at() -> None:
    assert make_batcher().choose(FairQueue(), 0.0) is None


async def test_a_full_batch_goes_at_once_and_leaves_the_rest() -> None:
    queue = fill(*(wait() for _ in range(5)))
    batcher = make_batcher()
    assert describe(batcher.choose(queue, 0.0)) == ("max_batch_size", 4)
    assert batcher.choose(queue, 0.0) == 2.0


async def test_a_batch_that_has_waited_goes_as_it_is() -> None:
    queue = fill(wait(submitted=1.0), wait(submitted=2.5))
    batcher = make_batcher()
    assert batcher.choose(queue, 2.5) == 0.5
    assert describe(batcher.choose(queue, 3.0)) == ("max_queue_delay", 2)


async def test_a_deadline_releases_a_batch_while_there_is_time_for_its_run() -> None:
    batcher = make_batcher(max_wait_s=50.0)
    batcher.learn(SMALL, 2.0)
    queue = fill(wait(), wait(deadline=10.0))
    assert batcher.choose(queue, 6.0) == pytest.approx(1.0)  # one and a half runs before the deadline
    assert describe(batcher.choose(queue, 7.0)) == ("deadline", 2)


async def test_near_the_end_nothing_is_waited_for() -> None:
    batcher = make_batcher()
    batcher.is_draining = True
    assert describe(batcher.choose(fill(wait()), 0.0)) == ("shutdown", 1)


async def test_the_pixel_budget_makes_batches_of_large_canvases_smaller() -> None:
    batcher = make_batcher(max_batch_size=8, limit_pixels=900)
    assert [batcher.count_places(shape) for shape in (SMALL, LARGE, (3, 50, 50))] == [8, 2, 1]
    queue = fill(*(wait(shape=LARGE) for _ in range(3)))
    assert describe(batcher.choose(queue, 0.0)) == ("max_batch_size", 2)


async def test_of_two_canvases_the_urgent_one_goes_first_then_the_one_that_waited_longer() -> None:
    queue = fill(wait(submitted=0.5), wait(submitted=0.0, shape=LARGE), wait(submitted=0.9, priority=1))
    batcher = make_batcher(max_wait_s=0.1)
    chosen = [batcher.choose(queue, 1.0) for _ in range(2)]
    assert [batch.items[0].pixels.shape for batch in chosen if isinstance(batch, ImageBatch)] == [SMALL, LARGE]
    queue = fill(wait(submitted=0.5), wait(submitted=0.0, shape=LARGE))
    first = batcher.choose(queue, 1.0)
    assert isinstance(first, ImageBatch)
    assert first.items[0].pixels.shape == LARGE


async def test_a_canvas_short_of_memory_gets_smaller_batches_until_it_ran_well_for_long() -> None:
    batcher = make_batcher(max_batch_size=16)
    batcher.shrink(LARGE, 16)
    batcher.shrink(LARGE, 8)
    assert (batcher.count_places(LARGE), batcher.count_places(SMALL)) == (4, 16)
    batcher.shrink(LARGE, 1)
    assert batcher.count_places(LARGE) == 1
    for _ in range(100):
        batcher.learn(LARGE, 1.0)
    assert batcher.count_places(LARGE) == 2
    for _ in range(300):
        batcher.learn(LARGE, 1.0)
    assert batcher.count_places(LARGE) == 16


async def test_the_time_ahead_follows_from_measured_runs() -> None:
    batcher = make_batcher()
    assert batcher.estimate_s(9) == 1.5  # three runs of half a second, the first guess
    batcher.learn(SMALL, 2.0)
    assert batcher.estimate_s(4) == 2.0
    batcher.learn(SMALL, 1.0)
    assert batcher.estimate_s(8) == pytest.approx(2 * 1.8)
