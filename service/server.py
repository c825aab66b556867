"""Runs the HTTP server: sockets, timeouts of clients, the port for health and metrics, graceful shutdown."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Literal

import h11
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.errors import ConfigError, UsegError
from service.middleware import AppState
from service.problems import make_error_response
from service.rollout.model_repository import ModelRepository
from service.settings import Settings

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 1024
"""Maximum size of a request line with all headers; beyond it uvicorn responds with 400."""
_ADMIN_PORT_PATHS = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol with timeouts for slow headers, idle connections and slow reads.

    `RequestMiddleware` handles slow bodies.
    """

    client_timeout_s = 10.0
    """Maximum time to receive all headers, and between two reads of a response by the client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets this only for sockets with the protocol TCP, and socket.create_server gives none: each body then
        # waited 43 ms for the acknowledgement of the headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # the headers are not complete
            if self._timer is None and self.cycle is not None and self.cycle.response_complete:
                self._start_timer()
        else:
            self._stop_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_timer()  # closing waits until the client has read everything

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def make_uvicorn_config(app: Any, settings: Settings, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    """Return uvicorn's options."""
    return uvicorn.Config(
        app,
        http=type("Protocol", (TimeoutH11Protocol,), {"client_timeout_s": settings.client_timeout_s}),
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(settings.graceful_shutdown_timeout_s)),
    )


class AdminPortApp:
    """ASGI app for the admin port: health and metrics of the main app, without API keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _ADMIN_PORT_PATHS:
            await make_error_response(HTTPException(404), "-")(scope, receive, send)
            return
        scope.setdefault("state", {})["is_admin_port"] = True
        await self._app(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; `graceful_shutdown` installs ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error


async def serve_app(app: FastAPI, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve `app` until a signal arrives; `on_ready` gets the base URL once requests are accepted.

    Raises UsegError if the artifact cannot be loaded.
    """
    state: AppState = app.state.useg
    server = Server(make_uvicorn_config(app, state.settings))
    announcement = asyncio.create_task(_announce(state.model_repository, server, listener, on_ready))
    async with _serve_admin_port(app, state.settings), _serve_grpc(app, state) as stop_grpc:
        with graceful_shutdown(server, state.model_repository, state.settings.shutdown_delay_s, stop_grpc):
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
    server = Server(make_uvicorn_config(AdminPortApp(app), settings, lifespan="off"))
    with contextlib.closing(bind(settings.host, settings.admin_port)) as listener:
        logger.info("health and metrics on port %d", listener.getsockname()[1])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def _serve_grpc(app: FastAPI, state: AppState) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Serve gRPC, if it has a port; yields a function that stops it. Raises ConfigError if grpcio is not installed."""
    if state.settings.grpc_port < 0:
        yield partial(asyncio.sleep, 0)
        return
    try:
        from service.oip.grpc_server import serve_grpc
    except ImportError as error:
        raise ConfigError("grpc_port needs grpcio: pip install 'useg[grpc]'") from error
    async with serve_grpc(app, state) as (_, stop):
        yield stop
