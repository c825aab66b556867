"""useg-serve: the service from the command line."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from types import FrameType

import cv2
import uvicorn
from fastapi import FastAPI

from model.backends.session import BACKENDS
from model.errors import ConfigError, UsegError
from service.app import create_app
from service.inference.loaded_model import ModelLoader
from service.middleware.api_keys import generate_api_key
from service.middleware.auth import AdminPortApp
from service.middleware.client_timeouts import make_uvicorn_config
from service.rollout.controller import ArtifactLoader
from service.server import Server, graceful_shutdown
from service.settings import LOG_FORMATS, Settings, read_settings
from service.telemetry.logging import TEXT_FORMAT, JsonFormatter

_FLAGS = {
    "artifact": ("DIR", "directory of the artifact"),
    "names-file": ("FILE", "where names that people give to its clusters are kept"),
    "registry": ("DIR", "registry whose models are served in the artifact's place"),
    "default-model": ("NAME", "the registry's model that answers where none is named"),
    "trusted-keys": ("FILE", "public keys; artifacts that none of them signed are refused"),
    "registry-poll-s": ("S", "time between two looks at the registry"),
    "rollback-s": ("S", "how long a replaced version is kept warm, and its successor watched"),
    "candidate-slowest": ("N", "how many times as slow as the active version a new one may be"),
    "drift-limit": ("N", "how far a new version's answers may drift from their reference"),
    "error-limit": ("SHARE", "on how many pictures a new version may fail"),
    "backend": ("|".join(BACKENDS), "what runs the network"),
    "host": ("ADDRESS", "address to listen on"),
    "port": ("N", "TCP port, 0 for a free one"),
    "admin-port": ("N", "TCP port for health and metrics, too; 0 for a free one, -1 for none"),
    "key-file": ("FILE", "API keys, as --new-key makes them"),
    "admin-key-file": ("FILE", "the same, of those who may change what is served"),
    "allow-anyone": ("true|false", "serve other machines without keys"),
    "rate-per-s": ("N", "requests a second of one key or address, 0 for no limit"),
    "burst": ("N", "requests at once within that rate"),
    "max-batch": ("N", "most pictures in one run of the network"),
    "max-wait-ms": ("MS", "longest wait for a batch to fill"),
    "limit-batch-pixels": ("N", "most pixels in one run of the network"),
    "queue": ("N", "most pictures that wait"),
    "max-queue-s": ("S", "longest wait that is begun"),
    "limit-bytes": ("N", "largest request body"),
    "limit-pixels": ("N", "largest picture"),
    "threads": ("N", "threads of the network"),
    "deadline-s": ("S", "longest time to an answer"),
    "stall-s": ("S", "longest pause of a client"),
    "stuck-s": ("S", "longest run of the network before it is started again"),
    "drain-delay-s": ("S", "after SIGTERM, not ready but taking requests"),
    "drain-limit-s": ("S", "then longest time to finish"),
    "otlp-endpoint": ("URL", "collector of OpenTelemetry for spans"),
    "trace-share": ("SHARE", "share of requests whose spans are sent"),
    "log-format": ("|".join(LOG_FORMATS), "log lines for people or machines"),
}


def main(
    arguments: Sequence[str] | None = None,
    *,
    opener: ModelLoader | None = None,
    open_artifact: ArtifactLoader | None = None,
) -> int:
    """Serve until interrupted; `opener` and `open_artifact` as in `create_app`.

    Exit status: 0, 1 for an error that is told in one line, 2 for wrong usage.
    """
    flags = {name: text for name, text in vars(make_parser().parse_args(arguments)).items() if text is not None}
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _exit)
    try:
        if name := flags.pop("new_key", None):
            print("key:  {}\nline: {}".format(*generate_api_key(name)))
            return 0
        settings = read_settings(flags=flags)
        cv2.setNumThreads(1)  # pictures are decoded beside each other: threads within one would only get in the way
        configure_logging(settings)
        with contextlib.closing(bind(settings)) as listener:
            asyncio.run(serve(create_app(settings, opener=opener, open_artifact=open_artifact), listener))
    except UsegError as error:
        print(f"useg-serve: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; every flag is a setting, and goes before its `USEG_*` variable."""
    parser = argparse.ArgumentParser(
        prog="useg-serve",
        description="Serve an artifact over HTTP.",
        epilog="Each flag is also a variable: --max-batch-size is USEG_MAX_BATCH_SIZE. USEG_KEYS holds comma-separated keys.",
    )
    defaults = Settings()
    for name, (metavar, text) in _FLAGS.items():
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", metavar=metavar, help=f"{text} ({default})")
    parser.add_argument(
        "--new-key", metavar="NAME", help="print a new API key and its line for --api-key-file, and end"
    )
    return parser


def configure_logging(settings: Settings) -> None:
    """Log to stderr in the chosen form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def bind(settings: Settings) -> socket.socket:
    """A listening socket. Raises ConfigError if the address is taken or not ours."""
    return _listen(settings.host, settings.port)


async def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises UsegError if the artifact is refused."""
    settings: Settings = app.state.parts.settings
    server = Server(
        make_uvicorn_config(
            app, client_timeout_s=settings.client_timeout_s, finish_s=settings.graceful_shutdown_timeout_s
        )
    )
    announcement = asyncio.create_task(announce(app, server, listener))
    async with _serve_admin_port(app, settings):
        with graceful_shutdown(server, app.state.parts.model_repository, settings.shutdown_delay_s):
            await server.serve(sockets=[listener])
    announcement.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await announcement


async def announce(app: FastAPI, server: uvicorn.Server, listener: socket.socket) -> None:
    """Tell where the service is once it is ready; end the server and raise if its artifact is refused."""
    try:
        await app.state.parts.model_repository.settle()
    except UsegError:
        server.should_exit = True
        raise
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"useg is ready: {address}/\n  curl -F file=@photo.jpg {address}/v1/segment", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error


@contextlib.asynccontextmanager
async def _serve_admin_port(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """Health and metrics on their own port, if there is one, for longer than the main one."""
    if settings.admin_port < 0:
        yield
        return
    config = make_uvicorn_config(AdminPortApp(app), client_timeout_s=settings.client_timeout_s, finish_s=1.0)
    config.lifespan = "off"
    server = Server(config)
    with contextlib.closing(_listen(settings.host, settings.admin_port)) as listener:
        logging.getLogger(__name__).info("health and metrics on port %d", listener.getsockname()[1])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def _exit(_signal: int, _frame: FrameType | None) -> None:
    """Before the server takes signals itself there is nothing to finish."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
