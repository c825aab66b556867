"""Work that ends when nobody waits for it any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from model.errors import DeadlinePassed

T = TypeVar("T")


async def finish_for_client(request: Request, work: Coroutine[Any, Any, T], deadline: float) -> T:
    """What `work` returns or raises; the request's body must have been read.

    Cancels it and raises ClientDisconnect when the client hangs up first, DeadlinePassed at `deadline` (the event
    loop's clock).
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_hangup(request))
    timeout_s = deadline - asyncio.get_running_loop().time()
    try:
        await asyncio.wait({task, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ClientDisconnect
        raise DeadlinePassed("the answer was not ready within the time limit: send fewer at once, or try again")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_hangup(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
