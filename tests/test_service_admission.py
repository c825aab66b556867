"""Places are bounded, and a caller who has many gives one up to a caller who has few."""

import asyncio

import pytest
from prometheus_client import Gauge

from model.errors import QueueFull
from service.inference.admission import AdmissionController
from service.requests import RequestContext
from service.telemetry.metrics import SharedGauge

pytestmark = pytest.mark.anyio


def make_places(capacity: int) -> AdmissionController:
    return AdmissionController(
        capacity,
        lambda: QueueFull("full", retry_after_s=3),
        SharedGauge(Gauge("useg_requests_in_flight", "Places.", registry=None)),
    )


async def hold(places: AdmissionController, owner: str, priority: int = 2) -> None:
    with places.admit(RequestContext(deadline=0.0, owner=owner, priority=priority)):
        await asyncio.Event().wait()


async def begin(places: AdmissionController, *owners: str, priority: int = 2) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(hold(places, owner, priority)) for owner in owners]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def see(tasks: list[asyncio.Task[None]]) -> str:
    """A letter each: holds its place, or is turned away as busy."""
    return "".join("B" if each.done() and isinstance(each.exception(), QueueFull) else "h" for each in tasks)


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_caller_alone_may_have_all_places_and_no_more() -> None:
    places = make_places(3)
    tasks = await begin(places, *"aaaa")
    assert see(tasks) == "hhhB"
    await end(tasks[:1])
    more = await begin(places, "a")
    assert see(more) == "h"
    await end(tasks + more)


async def test_a_caller_without_a_place_gets_the_newest_of_who_has_most() -> None:
    places = make_places(4)
    tasks = await begin(places, *"aaab")
    tasks += await begin(places, *"c")
    assert see(tasks) == "hhBhh"
    tasks += await begin(places, *"d")
    assert see(tasks) == "hBBhhh"
    tasks += await begin(places, *"bcda")  # all have one now: nobody has two more than another
    assert see(tasks) == "hBBhhhBBBB"
    await end(tasks)


async def test_the_urgent_take_the_place_of_the_least_urgent() -> None:
    places = make_places(2)
    tasks = [*await begin(places, "a", priority=2), *await begin(places, "b", priority=3)]
    tasks += await begin(places, "a", priority=1)
    assert see(tasks) == "hBh"
    tasks += await begin(places, "b", priority=3)
    assert see(tasks) == "hBhB"
    await end(tasks)


async def test_a_request_that_is_cancelled_is_cancelled_and_not_busy() -> None:
    places = make_places(1)
    tasks = await begin(places, "a")
    await end(tasks)
    assert tasks[0].cancelled()
    tasks = await begin(places, "b")
    assert see(tasks) == "h"
    await end(tasks)
