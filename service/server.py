"""The end of a service: nobody new is invited, whoever came is answered, and then it is over."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator

import uvicorn

from service.rollout.model_repository import ModelRepository

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Uvicorn's, but for signals, which `graceful_shutdown` takes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def graceful_shutdown(server: uvicorn.Server, model_repository: ModelRepository, delay_s: float) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT end the server; whatever it has taken is finished.

    SIGTERM comes from whoever also sends the requests elsewhere: for `delay_s` the service says that it is not ready
    and still answers. SIGINT comes from a person, who does not wait. A second signal waits for nobody.
    """
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def leave(delay_s: float) -> None:
        if model_repository.is_draining:
            server.force_exit = server.should_exit = True
        else:
            tasks.append(asyncio.create_task(_shut_down(server, model_repository, delay_s)))

    loop.add_signal_handler(signal.SIGTERM, leave, delay_s)
    loop.add_signal_handler(signal.SIGINT, leave, 0.0)
    try:
        yield
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        for task in tasks:
            task.cancel()


async def _shut_down(server: uvicorn.Server, model_repository: ModelRepository, delay_s: float) -> None:
    logger.info("leaving: not ready from now on, no new connections in %g s", delay_s)
    model_repository.drain()
    await asyncio.sleep(delay_s)
    server.should_exit = True
