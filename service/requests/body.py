"""The bytes of a request's body, never more of them than the limit."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request

from model.errors import ImageTooLarge, MediaUnsupported


async def stream_body(request: Request, limit_bytes: int, stall_s: float) -> AsyncGenerator[bytes, None]:
    """The body in chunks; counts for itself, because a chunked request announces no length.

    Raises ImageTooLarge as soon as the limit is passed, MediaUnsupported for a compressed body, TimeoutError after a
    pause of `stall_s`, and ClientDisconnect.
    """
    _check_length(request.headers.get("content-length", ""), limit_bytes)
    _check_encoding(request.headers.get("content-encoding", "identity"))
    received, stream = 0, request.stream()
    while (chunk := await asyncio.wait_for(anext(stream, None), stall_s)) is not None:
        received += len(chunk)
        if received > limit_bytes:
            raise ImageTooLarge(f"the body has more than {limit_bytes} bytes, no more are taken: send a smaller file")
        yield chunk


def _check_length(given: str, limit_bytes: int) -> None:
    if given.isdecimal() and int(given) > limit_bytes:
        raise ImageTooLarge(f"the body has {given} bytes, at most {limit_bytes} are taken: send a smaller file")


def _check_encoding(given: str) -> None:
    if given.lower() != "identity":
        raise MediaUnsupported(f"a body with Content-Encoding {given!r} is not read: send it without")
