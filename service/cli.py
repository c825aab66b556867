"""Commands of the service: `useg serve` and `useg create-api-key`."""

import asyncio
import logging
import signal
import sys
from contextlib import closing
from datetime import UTC, datetime
from typing import Annotated, Any

import cv2
import orjson
from cyclopts import App, Parameter
from cyclopts.config import Env

from service.app import create_app
from service.auth import generate_api_key
from service.inference.loading import ArtifactLoader
from service.server import bind, serve_app
from service.settings import PREFIX, Settings, check_variable_names

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object per line, with the fields of `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


app = App(name="serve", config=(check_variable_names, Env(PREFIX, command=False)))
"""Reads `USEG_*` variables; flags override them."""


@app.default
def serve(*, settings: Annotated[Settings | None, Parameter(name="*")] = None) -> None:
    """Serve an artifact or a model registry over HTTP.

    Each option can also be set by an environment variable: --max-batch-size is USEG_MAX_BATCH_SIZE.
    """
    run(settings or Settings())


def create_api_key(name: str, /) -> dict[str, Any]:
    """Create an API key and print it with its line for --api-key-file.

    Parameters
    ----------
    name
        Name of the caller, as it appears in logs: letters, digits, `.`, `_` and `-`.
    """
    key, line = generate_api_key(name)
    return {"key": key, "line": line}


def run(settings: Settings, load_artifact: ArtifactLoader | None = None) -> None:
    """Configure logging and serve until a signal; a line on stdout gives the address once requests are accepted.

    Raises UsegError if the address is not available or the artifact cannot be loaded.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)  # noqa: TID251
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda _signal, _frame: sys.exit(0))  # until `graceful_shutdown` handles them
    cv2.setNumThreads(1)  # images are decoded in parallel: threads within one decoder only compete
    with closing(bind(settings.host, settings.port)) as listener:
        asyncio.run(serve_app(create_app(settings, load_artifact), listener, _print_address))


def _print_address(url: str) -> None:
    print(f"useg is ready: {url}/\n  curl -F file=@photo.jpg {url}/v1/segment", flush=True)
