"""Runs the HTTP server: sockets, the port for health and metrics, graceful shutdown."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import FrameType

import cv2
import uvicorn
from fastapi import FastAPI

from model.errors import ConfigError, UsegError
from service.app import create_app
from service.inference.loaded_model import ModelLoader
from service.middleware.auth import AdminPortApp
from service.middleware.client_limits import make_uvicorn_config
from service.rollout.controller import ArtifactLoader
from service.rollout.model_repository import ModelRepository
from service.settings import Settings

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; `graceful_shutdown` installs ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(
    settings: Settings,
    on_ready: Callable[[str], None],
    *,
    load_model: ModelLoader | None = None,
    load_artifact: ArtifactLoader | None = None,
) -> None:
    """Serve until a signal arrives; `on_ready` gets the base URL once requests are accepted.

    `load_model` and `load_artifact` are those of `create_app`.
    Raises UsegError if the address is not available or the artifact cannot be loaded.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _exit)
    cv2.setNumThreads(1)  # images are decoded in parallel: threads within one decoder only compete
    with contextlib.closing(bind(settings.host, settings.port)) as listener:
        app = create_app(settings, load_model=load_model, load_artifact=load_artifact)
        asyncio.run(serve_app(app, settings, listener, on_ready))


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error


async def serve_app(app: FastAPI, settings: Settings, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve `app` until a signal arrives. Raises UsegError if the artifact cannot be loaded."""
    repository: ModelRepository = app.state.useg.model_repository
    timeouts = {"client_timeout_s": settings.client_timeout_s, "finish_s": settings.graceful_shutdown_timeout_s}
    server = Server(make_uvicorn_config(app, **timeouts))
    announcement = asyncio.create_task(_announce(repository, server, listener, on_ready))
    async with _serve_admin_port(app, settings), _serve_grpc(app, settings) as stop_grpc:
        with graceful_shutdown(server, repository, settings.shutdown_delay_s, stop_grpc):
            await server.serve(sockets=[listener])
    announcement.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await announcement


@contextlib.contextmanager
def graceful_shutdown(
    server: uvicorn.Server,
    repository: ModelRepository,
    delay_s: float,
    stop_grpc: Callable[[], Awaitable[None]],
) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT shut the server down and in-flight requests are finished, first those of gRPC.

    After SIGTERM, readiness fails for `delay_s` while requests are still accepted, so that load balancers can react.
    SIGINT skips that delay. A second signal stops the server at once.
    """
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    async def shut_down(delay_s: float) -> None:
        logger.info("shutting down: readiness is failing; new connections stop in %g s", delay_s)
        repository.drain()
        await asyncio.sleep(delay_s)
        await stop_grpc()
        server.should_exit = True

    def on_signal(delay_s: float) -> None:
        if repository.is_draining:
            server.force_exit = server.should_exit = True
        else:
            tasks.append(asyncio.create_task(shut_down(delay_s)))

    loop.add_signal_handler(signal.SIGTERM, on_signal, delay_s)
    loop.add_signal_handler(signal.SIGINT, on_signal, 0.0)
    try:
        yield
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        for task in tasks:
            task.cancel()


async def _announce(
    repository: ModelRepository, server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]
) -> None:
    """Report the base URL once a model is ready; stop the server and raise if its artifact cannot be loaded."""
    try:
        await repository.wait_ready()
    except UsegError:
        server.should_exit = True
        raise
    host, port = listener.getsockname()[:2]
    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


@contextlib.asynccontextmanager
async def _serve_admin_port(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """Serve health and metrics on their own port, if there is one, until the main port is closed."""
    if settings.admin_port < 0:
        yield
        return
    config = make_uvicorn_config(AdminPortApp(app), client_timeout_s=settings.client_timeout_s, finish_s=1.0)
    config.lifespan = "off"
    server = Server(config)
    with contextlib.closing(bind(settings.host, settings.admin_port)) as listener:
        logger.info("health and metrics on port %d", listener.getsockname()[1])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def _serve_grpc(app: FastAPI, settings: Settings) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Serve gRPC, if it has a port; yields a function that stops it. Raises ConfigError if grpcio is not installed."""
    if settings.grpc_port < 0:
        yield partial(asyncio.sleep, 0)
        return
    try:
        from service.oip.grpc_server import serve_grpc
    except ImportError as error:
        raise ConfigError("grpc_port needs grpcio: pip install 'useg[grpc]'") from error
    async with serve_grpc(app, app.state.useg) as (_, stop):
        yield stop


def _exit(_signal: int, _frame: FrameType | None) -> None:
    """Exit at once: before `graceful_shutdown` handles signals there is nothing to finish."""
    sys.exit(0)
