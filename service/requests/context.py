"""What a request's headers say of its hurry, and of whom it is for."""

import asyncio
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from model.errors import DeadlineExceeded, InvalidParameter

NORMAL_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY = 2, 1, 3
TIMEOUT_HEADER, PRIORITY_HEADER = "X-Request-Timeout-Ms", "X-Request-Priority"
ROUTING_HEADER = "X-Routing-Key"
_WHOLE = re.compile(r"[1-9]\d{0,8}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """In whose name, how urgently and until when something is asked."""

    deadline: float
    """On the event loop's clock."""
    owner: str = ""
    """Name of the API key, or the client's address."""
    priority: int = NORMAL_PRIORITY
    """1 to 3; 1 goes first."""


def parse_request_context(request: Request, limit_s: float) -> RequestContext:
    """Whose request it is and how it hurries; its time ends with `limit_s` from now on, or sooner if it asks for that.

    Raises InvalidParameter for a time limit or a priority that is none.
    """
    timeout_ms = _parse_integer_header(request, TIMEOUT_HEADER, "milliseconds, 1 or more")
    priority = (
        _parse_integer_header(request, PRIORITY_HEADER, f"{HIGHEST_PRIORITY} (first) to {LOWEST_PRIORITY}")
        or NORMAL_PRIORITY
    )
    if not HIGHEST_PRIORITY <= priority <= LOWEST_PRIORITY:
        raise InvalidParameter(
            f"{PRIORITY_HEADER} must be {HIGHEST_PRIORITY} (first) to {LOWEST_PRIORITY}, got {priority}"
        )
    timeout_s = min(limit_s, timeout_ms / 1000) if timeout_ms else limit_s
    owner = getattr(request.state, "owner", "")
    return RequestContext(deadline=asyncio.get_running_loop().time() + timeout_s, owner=owner, priority=priority)


def get_routing_key(request: Request) -> str:
    """What decides who among the callers is answered by a canary: the same for the same key, owner or address."""
    return request.headers.get(ROUTING_HEADER) or str(getattr(request.state, "owner", ""))


def _parse_integer_header(request: Request, name: str, expected: str) -> int | None:
    given = request.headers.get(name)
    if given is None:
        return None
    if not _WHOLE.fullmatch(given.strip()):
        raise InvalidParameter(f"{name} must be a whole number, {expected}, got {given!r}")
    return int(given)


T = TypeVar("T")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T], deadline: float) -> T:
    """What `work` returns or raises; the request's body must have been read.

    Cancels it and raises ClientDisconnect when the client hangs up first, DeadlineExceeded at `deadline` (the event
    loop's clock).
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    timeout_s = deadline - asyncio.get_running_loop().time()
    try:
        await asyncio.wait({task, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ClientDisconnect
        raise DeadlineExceeded("the answer was not ready within the time limit: send fewer at once, or try again")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
