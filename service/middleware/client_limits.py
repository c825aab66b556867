"""Limits on clients: timeouts for slow headers, bodies and reads, and the size of request bodies."""

import asyncio
import socket
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.errors import ImageTooLarge, UnsupportedMediaType, UploadTimeout
from service.settings import Settings

MAX_HEADER_BYTES = 16 * 1024
"""Maximum size of a request line with all headers; beyond it uvicorn responds with 400."""
MAX_JSON_BYTES = 1024 * 1024
"""Maximum size of a body that holds no images."""
_IMAGE_PATHS = ("/v1/segment", "/v1/decode", "/v2/")


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol with timeouts for slow headers, idle connections and slow reads.

    `BodyLimitMiddleware` handles slow bodies.
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


def make_protocol_class(client_timeout_s: float) -> type[TimeoutH11Protocol]:
    """Return the protocol with a timeout; uvicorn takes a class and creates one object per connection."""
    return type("Protocol", (TimeoutH11Protocol,), {"client_timeout_s": client_timeout_s})


def make_uvicorn_config(app: Any, *, client_timeout_s: float, finish_s: float) -> Config:
    """Return uvicorn's options; `finish_s` is the maximum time for requests in flight at shutdown."""
    return Config(
        app,
        http=make_protocol_class(client_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(finish_s)),
    )


class BodyLimitMiddleware:
    """Pure ASGI middleware that bounds the size of request bodies and the time that clients take to send them.

    Reading the body raises ImageTooLarge, UnsupportedMediaType for a compressed body, and UploadTimeout.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, self._limit(scope, receive) if scope["type"] == "http" else receive, send)

    def _limit(self, scope: Scope, receive: Receive) -> Receive:
        settings, headers = self._settings, Headers(scope=scope)
        takes_images = scope["path"].startswith(_IMAGE_PATHS)
        max_bytes = settings.max_body_bytes if takes_images else MAX_JSON_BYTES
        deadline = asyncio.get_running_loop().time() + settings.request_timeout_s
        received, is_complete = 0, False

        async def receive_limited() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()
            if not received:
                _check_headers(headers, max_bytes)
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), min(left_s, settings.client_timeout_s))
            except TimeoutError as error:
                raise UploadTimeout("the body did not arrive in time: send a smaller one, or try again") from error
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise ImageTooLarge(f"the body has more than {max_bytes} bytes, the maximum: send a smaller file")
            is_complete = not message.get("more_body", False)
            return message

        return receive_limited


def _check_headers(headers: Headers, max_bytes: int) -> None:
    length, encoding = headers.get("content-length", ""), headers.get("content-encoding", "identity")
    if length.isdecimal() and int(length) > max_bytes:
        raise ImageTooLarge(f"the body has {length} bytes, the maximum is {max_bytes}: send a smaller file")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"unsupported Content-Encoding {encoding!r}: send the body uncompressed")
