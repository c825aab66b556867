"""Timeouts and socket options of connections."""

import asyncio
import socket
from contextlib import suppress

import pytest
from starlette.types import Receive, Scope, Send

from service.middleware.client_limits import make_uvicorn_config
from service.server import Server

ANSWER_BYTES, WAIT_S = 64 * 1024 * 1024, 10.0
pytestmark = pytest.mark.anyio


async def answer_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(ANSWER_BYTES)})
    else:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    server = Server(make_uvicorn_config(answer_at_length, client_timeout_s=0.2, finish_s=1.0))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            while not server.server_state.connections:
                await asyncio.sleep(0)
            while server.server_state.connections:
                await asyncio.sleep(0.01)
        received = 0
        with suppress(ConnectionResetError):
            while chunk := await loop.sock_recv(client, 1 << 20):
                received += len(chunk)
        assert received < ANSWER_BYTES
        server.should_exit = True
        await serving


async def test_connections_set_tcp_nodelay() -> None:
    server = Server(make_uvicorn_config(answer_at_length, client_timeout_s=WAIT_S, finish_s=1.0))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
        async with asyncio.timeout(WAIT_S):
            while not server.server_state.connections:
                await asyncio.sleep(0)
        (connection,) = server.server_state.connections
        own = connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        client.close()
        server.should_exit = True
        await serving
