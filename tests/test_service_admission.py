"""Slots are bounded, and a client that holds many loses one to a client that holds few."""

import asyncio

import pytest
from prometheus_client import Gauge

from model.errors import QueueFull
from service.inference.queue import AdmissionController
from service.requests import RequestContext
from service.telemetry.metrics import SharedGauge

pytestmark = pytest.mark.anyio


def make_controller(capacity: int) -> AdmissionController:
    return AdmissionController(
        capacity,
        lambda _context: None,
        lambda: QueueFull("full", retry_after_s=3),
        SharedGauge(Gauge("useg_requests_in_flight", "Slots.", registry=None)),
    )


async def hold(controller: AdmissionController, owner: str, priority: int = 2) -> None:
    with controller.admit(RequestContext(deadline=0.0, owner=owner, priority=priority)):
        await asyncio.Event().wait()


async def begin(controller: AdmissionController, *owners: str, priority: int = 2) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(hold(controller, owner, priority)) for owner in owners]
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
    controller = make_controller(3)
    tasks = await begin(controller, *"aaaa")
    assert see(tasks) == "hhhB"
    await end(tasks[:1])
    more = await begin(controller, "a")
    assert see(more) == "h"
    await end(tasks + more)


async def test_a_client_without_a_slot_gets_the_newest_of_the_client_with_most() -> None:
    controller = make_controller(4)
    tasks = await begin(controller, *"aaab")
    tasks += await begin(controller, *"c")
    assert see(tasks) == "hhBhh"
    tasks += await begin(controller, *"d")
    assert see(tasks) == "hBBhhh"
    tasks += await begin(controller, *"bcda")  # each holds one now: none has two more than another
    assert see(tasks) == "hBBhhhBBBB"
    await end(tasks)


async def test_an_urgent_request_takes_the_slot_of_the_least_urgent() -> None:
    controller = make_controller(2)
    tasks = [*await begin(controller, "a", priority=2), *await begin(controller, "b", priority=3)]
    tasks += await begin(controller, "a", priority=1)
    assert see(tasks) == "hBh"
    tasks += await begin(controller, "b", priority=3)
    assert see(tasks) == "hBhB"
    await end(tasks)


async def test_a_cancelled_request_is_not_reported_as_rejected() -> None:
    controller = make_controller(1)
    tasks = await begin(controller, "a")
    await end(tasks)
    assert tasks[0].cancelled()
    tasks = await begin(controller, "b")
    assert see(tasks) == "h"
    await end(tasks)
