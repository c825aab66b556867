"""Under overload the service rejects requests at once, keeps deadlines, drops cancelled work and slow clients."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import numpy as np
import pytest
from fake_service import RedSession, draw_halves, open_client, post, save
from live_service import WAIT_S, GatedSession, connect, listen, make_request, see_metric, wait_for
from starlette.types import Receive, Scope, Send

from model.contract import RawOutputs
from service.server import Server, make_uvicorn_config
from service.settings import Settings

HALVES = save(draw_halves())
INFER = "v2/models/fake/infer"

pytestmark = pytest.mark.anyio


async def test_requests_beyond_the_queue_are_rejected_and_the_others_succeed() -> None:
    session = GatedSession()
    async with open_client(session.open, max_queue_size=1, max_batch_size=1) as client:
        first = asyncio.create_task(post(client, HALVES))
        await wait_for(session.is_inside)
        others = [asyncio.create_task(post(client, HALVES)) for _ in range(3)]
        for answer in [await each for each in itertools.islice(asyncio.as_completed(others), 2)]:
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:useg:problem:queue-full")
            assert int(answer.headers["retry-after"]) * 1000 == answer.json()["retry_after_ms"] > 0
        session.gate.set()
        assert (await first).status_code == 200
        assert sorted([(await each).status_code for each in others]) == [200, 503, 503]
        assert 'useg_requests_rejected_total{reason="queue_full"} 2.0' in (await client.get("/metrics")).text
        assert (await post(client, HALVES)).status_code == 200


async def test_a_body_that_does_not_arrive_is_408() -> None:
    async def stall() -> AsyncIterator[bytes]:
        yield HALVES[:100]
        await asyncio.Event().wait()

    async with open_client(request_timeout_s=0.1) as client:
        for path, media in (("v1/segment", "image/png"), ("v1/segment", "application/json"), (INFER, "image/png")):
            answer = await client.post(f"/{path}", content=stall(), headers={"Content-Type": media})
            assert (answer.status_code, "did not arrive" in answer.text) == (408, True)
        assert 'outcome="client_error",task="panoptic",version="1+test"} 2.0' in (await client.get("/metrics")).text


async def test_health_checks_succeed_while_the_network_is_busy() -> None:
    session = GatedSession()
    async with open_client(session.open) as client:
        busy = asyncio.create_task(post(client, HALVES))
        await wait_for(session.is_inside)
        assert [(await client.get(path)).status_code for path in ("/livez", "/readyz", "/metrics")] == [200] * 3
        session.gate.set()
        assert (await busy).status_code == 200


async def test_an_image_of_a_disconnected_client_is_never_run() -> None:
    session = GatedSession()
    async with listen(session.open, max_batch_size=1) as (host, port):
        async with connect(host, port, make_request(HALVES)):
            await wait_for(session.is_inside)
            async with connect(host, port, make_request(HALVES)):
                await see_metric(host, port, "useg_queue_depth 1.0")
        await see_metric(host, port, 'useg_requests_cancelled_total{stage="queue"} 1.0')
        await see_metric(host, port, 'useg_requests_cancelled_total{stage="infer"} 1.0')
        session.gate.set()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            assert (await post(client, HALVES)).status_code == 200
    assert session.images == 2  # the one that was running when its client disconnected, and the last


class GatedRaw:
    """Raw outputs whose postprocessing waits for a gate."""

    def __init__(self, raw: RawOutputs, session: GatedSession) -> None:
        self._raw, self._session = raw, session

    def __getattr__(self, name: str) -> Any:
        if name == "clusters":
            self._session.is_inside.set()
            assert self._session.gate.wait(WAIT_S)
        return getattr(self._raw, name)


class GatedOutputsSession(GatedSession):
    """Runs at once; postprocessing waits."""

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        self.images += bool(pixels.any())
        return [GatedRaw(raw, self) for raw in RedSession().run(pixels, sizes)]


async def test_work_of_disconnected_clients_is_dropped_before_decoding_and_after_inference() -> None:
    session = GatedOutputsSession()
    async with listen(session.open, max_batch_size=1, intra_op_threads=1) as (host, port):
        async with connect(host, port, make_request(HALVES)):
            await wait_for(session.is_inside)
            async with connect(host, port, make_request(HALVES)):
                await see_metric(host, port, "useg_requests_in_flight 2.0")
        await see_metric(host, port, 'useg_requests_cancelled_total{stage="merge"} 1.0')
        await see_metric(host, port, 'useg_requests_cancelled_total{stage="decode"} 1.0')
        await see_metric(host, port, "useg_requests_in_flight 0.0")
        session.gate.set()
    assert session.images == 1  # the second was never decoded


async def test_a_client_that_disconnects_within_its_body_counts_as_cancelled() -> None:
    async with listen() as (host, port):
        async with connect(host, port, make_request(HALVES)[:-10]):
            pass
        await see_metric(host, port, 'useg_requests_cancelled_total{stage="read"} 1.0')


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost:"])
async def test_a_connection_with_a_slow_header_is_closed(sent: bytes) -> None:
    async with listen(client_timeout_s=0.2) as (host, port), connect(host, port, sent) as reader:
        with suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), WAIT_S)


@pytest.mark.parametrize(
    ("sent", "settings", "status"),
    [
        (make_request(bytes(10_000_000))[:500], {"max_body_bytes": 1000}, b"413"),
        (make_request(HALVES)[:-10], {"client_timeout_s": 0.2, "request_timeout_s": 1000.0}, b"408"),
        (b"GET /livez HTTP/1.1\r\nX: " + b"x" * 20_000, {}, b"400"),
    ],
)
async def test_a_large_or_slow_request_is_rejected_before_it_is_complete(
    sent: bytes, settings: dict[str, Any], status: bytes
) -> None:
    async with listen(**settings) as (host, port), connect(host, port, sent) as reader:
        assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 " + status)


ANSWER_BYTES = 64 * 1024 * 1024


async def answer_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(ANSWER_BYTES)})
    else:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


@asynccontextmanager
async def answer_one(client_timeout_s: float, sent: bytes = b"") -> AsyncIterator[tuple[Server, socket.socket]]:
    """A server that answers at length, and the socket of its only client."""
    settings = Settings(client_timeout_s=client_timeout_s, graceful_shutdown_timeout_s=1.0)
    server = Server(make_uvicorn_config(answer_at_length, settings))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
        await asyncio.get_running_loop().sock_sendall(client, sent)
        async with asyncio.timeout(WAIT_S):
            while not server.server_state.connections:
                await asyncio.sleep(0)
        yield server, client
        client.close()
        server.should_exit = True
        await serving


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    async with answer_one(client_timeout_s=0.2, sent=b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as (server, client):
        async with asyncio.timeout(WAIT_S):
            while server.server_state.connections:
                await asyncio.sleep(0.01)
        received = 0
        with suppress(ConnectionResetError):
            while chunk := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                received += len(chunk)
        assert received < ANSWER_BYTES


async def test_connections_set_tcp_nodelay() -> None:
    async with answer_one(client_timeout_s=WAIT_S) as (server, _):
        (connection,) = server.server_state.connections
        own = connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
