"""useg-serve: the service from the command line."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from model.backends.session import BACKENDS
from model.errors import ConfigError, UsegError
from service.app import create_app
from service.deployment import Opener
from service.settings import Settings, read_settings

_FLAGS = {
    "artifact": ("DIR", "directory of the artifact"),
    "backend": ("|".join(BACKENDS), "what runs the network"),
    "host": ("ADDRESS", "address to listen on"),
    "port": ("N", "TCP port, 0 for a free one"),
    "max-batch": ("N", "most pictures in one run of the network"),
    "max-wait-ms": ("MS", "longest wait for a batch to fill"),
    "queue": ("N", "most pictures that wait"),
    "limit-bytes": ("N", "largest request body"),
    "limit-pixels": ("N", "largest picture"),
    "threads": ("N", "threads of the network"),
    "deadline-s": ("S", "longest time to an answer"),
}


def main(arguments: Sequence[str] | None = None, *, opener: Opener | None = None) -> int:
    """Serve until interrupted; `opener` as in `create_app`.

    Exit status: 0, 1 for an error that is told in one line, 2 for wrong usage.
    """
    flags = {name: text for name, text in vars(make_parser().parse_args(arguments)).items() if text is not None}
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    try:
        settings = read_settings(flags=flags)
        with contextlib.closing(bind(settings)) as listener:
            asyncio.run(serve(create_app(settings, opener=opener), listener))
    except UsegError as error:
        print(f"useg-serve: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; every flag is a setting, and goes before its `USEG_*` variable."""
    parser = argparse.ArgumentParser(
        prog="useg-serve",
        description="Serve an artifact over HTTP.",
        epilog="Each flag is also a variable: --max-batch is USEG_MAX_BATCH.",
    )
    defaults = Settings()
    for name, (metavar, text) in _FLAGS.items():
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", metavar=metavar, help=f"{text} ({default})")
    return parser


def bind(settings: Settings) -> socket.socket:
    """A listening socket. Raises ConfigError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from error


async def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises UsegError if the artifact is refused."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", server_header=False)
    server = uvicorn.Server(config)
    announcement = asyncio.create_task(announce(app, server, listener))
    await server.serve(sockets=[listener])
    announcement.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await announcement


async def announce(app: FastAPI, server: uvicorn.Server, listener: socket.socket) -> None:
    """Tell where the service is once it is ready; end the server and raise if its artifact is refused."""
    try:
        await app.state.parts.deployment.settle()
    except UsegError:
        server.should_exit = True
        raise
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"useg is ready: {address}/\n  curl -F file=@photo.jpg {address}/v1/segment", flush=True)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Uvicorn ends what runs, then raises the signal again: by then there is nothing to say."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
