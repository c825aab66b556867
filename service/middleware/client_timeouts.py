"""HTTP connections that wait for nobody: whoever dawdles over a header or an answer is cut off."""

import asyncio
import socket
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 16 * 1024
"""Of a request line with all its headers; beyond it uvicorn answers 400."""


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's own, but for time limits on what it would wait for without end.

    Those are a header, from the connection or the last answer on, and an answer that the client does not take in.
    A body's limits are with whoever reads it.
    """

    client_timeout_s = 10.0
    """Longest wait for a whole header, or for a reader to take in more of an answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that name TCP as their protocol, and a listener of socket.create_server names
        # none: each answer's body then waited 43 ms for the acknowledgement of its header.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stall: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # still within a header
            if self._stall is None and self.cycle is not None and self.cycle.response_complete:
                self._watch()
        else:
            self._relax()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._relax()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()  # closing waits until all was taken in

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._relax()
        self._stall = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def _relax(self) -> None:
        if self._stall:
            self._stall.cancel()
            self._stall = None


def make_protocol_class(client_timeout_s: float) -> type[TimeoutH11Protocol]:
    """The protocol with that patience; uvicorn takes a class and makes one object a connection."""
    return type("Protocol", (TimeoutH11Protocol,), {"client_timeout_s": client_timeout_s})


def make_uvicorn_config(app: Any, *, client_timeout_s: float, finish_s: float) -> Config:
    """Uvicorn's options; `finish_s` bounds how long it waits for answers that are under way when it ends."""
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
