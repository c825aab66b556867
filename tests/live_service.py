"""A service on real sockets, and a network that waits for a gate."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fake_service import CONTRACT, RedSession, open_fake

from model.backends.session import Session
from model.contract import Contract, RawOutputs
from service.app import create_app
from service.inference.loading import ArtifactLoader
from service.server import Server, bind, make_uvicorn_config
from service.settings import Settings

WAIT_S = 10.0


class GatedSession(RedSession):
    """Waits for its gate, and counts images; the black one of the warm-up passes."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_inside = threading.Event()
        self.images = 0

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        if pixels.any():
            self.images += len(pixels)
            self.is_inside.set()
            assert self.gate.wait(WAIT_S)
        return super().run(pixels, sizes)

    def open(self, _directory: Path) -> tuple[Contract, Session]:
        return CONTRACT, self


async def wait_for(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


@asynccontextmanager
async def listen(opener: ArtifactLoader = open_fake, **settings: Any) -> AsyncIterator[tuple[str, int]]:
    """Serve on a real socket; yields host and port."""
    chosen = Settings(port=0, graceful_shutdown_timeout_s=1.0, **settings)
    app = create_app(chosen, load_artifact=opener)
    with bind(chosen.host, chosen.port) as listener:
        server = Server(make_uvicorn_config(app, chosen))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait_for(app.state.useg.model_repository.wait_ready(), WAIT_S)
        host, port = listener.getsockname()
        try:
            yield host, port
        finally:
            server.should_exit = True
            await serving


@contextmanager
def serve_in_thread(opener: ArtifactLoader = open_fake, **settings: Any) -> Iterator[str]:
    """Serve on a real socket in a thread; yields the address, which ends in a slash."""
    addresses: list[str] = []
    is_ready, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with listen(opener, **settings) as (host, port):
            addresses.append(f"http://{host}:{port}/")
            is_ready.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_ready.wait(WAIT_S)
    yield addresses[0]
    is_over.set()
    thread.join(WAIT_S)


@asynccontextmanager
async def connect(host: str, port: int, sent: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """Open a connection and send bytes; it is closed at the end."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(sent)
    yield reader
    writer.close()
    with suppress(ConnectionResetError):
        await writer.wait_closed()


class MetricsFiles(SimpleHTTPRequestHandler):
    """Files of a folder: pages, and any other as node_exporter would serve metrics."""

    def guess_type(self, path: Any) -> str:
        return "text/html" if str(path).endswith(".html") else "text/plain; version=0.0.4"

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_folder(folder: Path) -> Iterator[int]:
    """Serve the files of a folder in a thread; yields the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(MetricsFiles, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


async def see_metric(host: str, port: int, line: str) -> None:
    """Wait until `/metrics` has a line."""
    async with asyncio.timeout(WAIT_S), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        while line not in (await client.get("/metrics")).text.splitlines():
            pass


def make_request(content: bytes, *headers: str) -> bytes:
    """Return the bytes of a POST with an image."""
    lines = ["POST /v1/segment HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content
