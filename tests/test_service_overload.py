"""Under too much work the service says so at once, keeps its deadlines, and drops work that nobody waits for."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fake_service import CONTRACT, RedSession, draw_halves, open_client, open_fake, post, save

from model.backends.session import Session
from model.contract import Contract
from model.raw import Raw
from service.__main__ import bind
from service.app import create_app
from service.deployment import Opener
from service.settings import Settings

WAIT_S = 10.0
HALVES = save(draw_halves())

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class GatedSession(RedSession):
    """Runs once its gate is open, and counts the pictures it saw; the black one of the warm-up passes."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_inside = threading.Event()
        self.pictures = 0

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[Raw]:
        if pixels.any():
            self.pictures += len(pixels)
            self.is_inside.set()
            assert self.gate.wait(WAIT_S)
        return super().run(pixels, sizes)

    def open(self) -> tuple[Contract, Session]:
        return CONTRACT, self


async def wait_for(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


@asynccontextmanager
async def listen(opener: Opener = open_fake, **settings: Any) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a service on a real socket."""
    chosen = Settings(port=0, **settings)
    app = create_app(chosen, opener=opener)
    with bind(chosen) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait_for(app.state.parts.deployment.settle(), WAIT_S)
        host, port = listener.getsockname()
        try:
            yield host, port
        finally:
            server.should_exit = True
            await serving


async def read_metric(host: str, port: int, start: str) -> list[str]:
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        return [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith(start)]


async def test_more_requests_than_places_are_busy_and_the_others_are_answered() -> None:
    session = GatedSession()
    async with open_client(session.open, queue=1, max_batch=1) as client:
        first = asyncio.create_task(post(client, HALVES))
        await wait_for(session.is_inside)
        others = [asyncio.create_task(post(client, HALVES)) for _ in range(3)]
        for answer in [await each for each in itertools.islice(asyncio.as_completed(others), 2)]:
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:useg:problem:busy")
            assert int(answer.headers["retry-after"]) >= 1
        session.gate.set()
        assert (await first).status_code == 200
        assert sorted([(await each).status_code for each in others]) == [200, 503, 503]
        assert 'seg_rejected_total{reason="busy"} 2.0' in (await client.get("/metrics")).text
        assert (await post(client, HALVES)).status_code == 200


async def test_an_answer_that_takes_too_long_is_504() -> None:
    session = GatedSession()
    async with open_client(session.open, deadline_s=0.2) as client:
        answer = await post(client, HALVES)
        session.gate.set()
        assert (answer.status_code, answer.json()["type"]) == (504, "urn:useg:problem:deadline-passed")


async def test_a_body_that_does_not_arrive_is_504() -> None:
    async def stall() -> AsyncIterator[bytes]:
        yield HALVES[:100]
        await asyncio.Event().wait()

    async with open_client(deadline_s=0.1) as client:
        answer = await client.post("/v1/segment", content=stall(), headers={"Content-Type": "image/png"})
        assert (answer.status_code, "did not arrive" in answer.json()["detail"]) == (504, True)


async def test_health_is_answered_while_the_network_is_busy() -> None:
    session = GatedSession()
    async with open_client(session.open) as client:
        busy = asyncio.create_task(post(client, HALVES))
        await wait_for(session.is_inside)
        assert [(await client.get(path)).status_code for path in ("/livez", "/readyz", "/metrics")] == [200] * 3
        session.gate.set()
        assert (await busy).status_code == 200


def make_request(content: bytes) -> bytes:
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def test_a_picture_whose_sender_hung_up_is_never_run() -> None:
    session = GatedSession()
    async with listen(session.open, max_batch=1) as (host, port):
        _, first = await asyncio.open_connection(host, port)
        first.write(make_request(HALVES))
        await wait_for(session.is_inside)
        _, second = await asyncio.open_connection(host, port)
        second.write(make_request(HALVES))
        while "seg_queue_depth 1.0" not in await read_metric(host, port, "seg_queue_depth"):
            pass
        for each in (first, second):
            each.close()
            await each.wait_closed()
        cancelled = 'seg_requests_total{outcome="cancelled",task="panoptic"} 2.0'
        while cancelled not in await read_metric(host, port, "seg_requests_total"):
            pass
        session.gate.set()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            assert (await post(client, HALVES)).status_code == 200
    assert session.pictures == 2  # the one inside when its sender left, and the last


async def test_a_sender_that_hangs_up_within_its_body_counts_as_cancelled() -> None:
    async with listen() as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        writer.write(make_request(HALVES)[:-10])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        cancelled = 'seg_requests_total{outcome="cancelled",task="panoptic"} 1.0'
        while cancelled not in await read_metric(host, port, "seg_requests_total"):
            pass


async def test_a_large_body_is_refused_over_a_socket_before_it_is_sent_whole() -> None:
    async with listen(limit_bytes=1000) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(make_request(bytes(10_000_000))[:500])
        status = await asyncio.wait_for(reader.readline(), WAIT_S)
        writer.close()
        await writer.wait_closed()
        assert status.startswith(b"HTTP/1.1 413 ")
