"""A batch goes when it is full, has waited, is pressed by a deadline, or the end is near; and says which."""

import numpy as np
import pytest

from service.inference.queue import BatchPolicy, FairQueue, ImageBatch, QueuedImage
from service.requests import RequestContext

pytestmark = pytest.mark.anyio
SMALL, LARGE = (3, 10, 10), (3, 20, 20)


def wait(
    submitted: float = 0.0, deadline: float = 100.0, priority: int = 2, shape: tuple[int, ...] = SMALL
) -> QueuedImage:
    context = RequestContext(deadline=deadline, priority=priority)
    return QueuedImage(pixels=np.zeros(shape, np.uint8), size=(2, 2), context=context, submitted=submitted)


def fill(*items: QueuedImage) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.put(item)
    return queue


def make_policy(max_batch_size: int = 4, max_queue_delay_s: float = 2.0, max_batch_pixels: int = 10_000) -> BatchPolicy:
    return BatchPolicy(
        max_batch_size=max_batch_size, max_queue_delay_s=max_queue_delay_s, max_batch_pixels=max_batch_pixels
    )


def describe(choice: ImageBatch | float | None) -> tuple[str, int]:
    assert isinstance(choice, ImageBatch)
    return choice.reason, len(choice.images)


async def test_an_empty_queue_has_no_batch() -> None:
    assert make_policy().choose(FairQueue(), 0.0) is None


async def test_a_full_batch_runs_at_once_and_leaves_the_rest() -> None:
    queue = fill(*(wait() for _ in range(5)))
    policy = make_policy()
    assert describe(policy.choose(queue, 0.0)) == ("max_batch_size", 4)
    assert policy.choose(queue, 0.0) == 2.0


async def test_a_batch_runs_when_its_first_image_has_waited_long_enough() -> None:
    queue = fill(wait(submitted=1.0), wait(submitted=2.5))
    policy = make_policy()
    assert policy.choose(queue, 2.5) == 0.5
    assert describe(policy.choose(queue, 3.0)) == ("max_queue_delay", 2)


async def test_a_batch_runs_in_time_for_its_closest_deadline() -> None:
    policy = make_policy(max_queue_delay_s=50.0)
    policy.record(SMALL, 2.0)
    queue = fill(wait(), wait(deadline=10.0))
    assert policy.choose(queue, 6.0) == pytest.approx(1.0)  # one and a half runs before the deadline
    assert describe(policy.choose(queue, 7.0)) == ("deadline", 2)


async def test_batches_run_without_delay_while_the_server_stops() -> None:
    policy = make_policy()
    policy.is_draining = True
    assert describe(policy.choose(fill(wait()), 0.0)) == ("shutdown", 1)


async def test_the_pixel_limit_makes_batches_of_large_inputs_smaller() -> None:
    policy = make_policy(max_batch_size=8, max_batch_pixels=900)
    assert [policy.batch_limit(shape) for shape in (SMALL, LARGE, (3, 50, 50))] == [8, 2, 1]
    queue = fill(*(wait(shape=LARGE) for _ in range(3)))
    assert describe(policy.choose(queue, 0.0)) == ("max_batch_size", 2)


async def test_between_input_sizes_priority_decides_then_waiting_time() -> None:
    queue = fill(wait(submitted=0.5), wait(submitted=0.0, shape=LARGE), wait(submitted=0.9, priority=1))
    policy = make_policy(max_queue_delay_s=0.1)
    chosen = [policy.choose(queue, 1.0) for _ in range(2)]
    assert [batch.images[0].pixels.shape for batch in chosen if isinstance(batch, ImageBatch)] == [SMALL, LARGE]
    queue = fill(wait(submitted=0.5), wait(submitted=0.0, shape=LARGE))
    first = policy.choose(queue, 1.0)
    assert isinstance(first, ImageBatch)
    assert first.images[0].pixels.shape == LARGE


async def test_an_input_size_short_of_memory_has_smaller_batches_until_many_runs_succeeded() -> None:
    policy = make_policy(max_batch_size=16)
    policy.halve_limit(LARGE, 16)
    policy.halve_limit(LARGE, 8)
    assert (policy.batch_limit(LARGE), policy.batch_limit(SMALL)) == (4, 16)
    policy.halve_limit(LARGE, 1)
    assert policy.batch_limit(LARGE) == 1
    for _ in range(100):
        policy.record(LARGE, 1.0)
    assert policy.batch_limit(LARGE) == 2
    for _ in range(300):
        policy.record(LARGE, 1.0)
    assert policy.batch_limit(LARGE) == 16


async def test_the_expected_wait_follows_from_measured_runs() -> None:
    policy = make_policy()
    assert policy.estimate_wait(9) == 1.5  # three runs of half a second, the first guess
    policy.record(SMALL, 2.0)
    assert policy.estimate_wait(4) == 2.0
    policy.record(SMALL, 1.0)
    assert policy.estimate_wait(8) == pytest.approx(2 * 1.8)


@pytest.mark.parametrize(("streams", "expected_s"), [(1, 1.5), (2, 1.0), (3, 0.5)])
async def test_streams_share_the_images_that_wait(streams: int, expected_s: float) -> None:
    policy = BatchPolicy(max_batch_size=2, max_queue_delay_s=0.0, max_batch_pixels=10_000, streams=streams)
    assert policy.estimate_wait(6) == expected_s
