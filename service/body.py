"""The bytes of the one picture in a request, never more of them than the limit."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from model.errors import DeadlinePassed, ImageTooLarge, MediaUnsupported, OptionInvalid

_MAX_FIELDS = 8
_EXPECTED = "send multipart/form-data with the picture in the field 'file', or the picture itself as image/*"


async def read_body(request: Request, limit_bytes: int, deadline: float) -> bytes:
    """The picture's bytes, from a form or from the body itself; what type they claim to be does not matter.

    Raises ImageTooLarge as soon as the limit is passed, MediaUnsupported, OptionInvalid for a form without exactly one
    picture, DeadlinePassed (`deadline` on the event loop's clock), and ClientDisconnect.
    """
    _check_length(request.headers.get("content-length", ""), limit_bytes)
    _check_encoding(request.headers.get("content-encoding", "identity"))
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        async with asyncio.timeout_at(deadline):
            if media == "multipart/form-data":
                return await _read_form(request, limit_bytes)
            if media == "application/octet-stream" or media.startswith("image/"):
                return b"".join([chunk async for chunk in _cap(request, limit_bytes)])
    except TimeoutError as error:
        raise DeadlinePassed("the body did not arrive within the time limit: send a smaller picture") from error
    raise MediaUnsupported(f"a body of type {media or '(none)'!r} is not read: {_EXPECTED}")


def _check_length(given: str, limit_bytes: int) -> None:
    if given.isdecimal() and int(given) > limit_bytes:
        raise ImageTooLarge(f"the body has {given} bytes, at most {limit_bytes} are taken: send a smaller file")


def _check_encoding(given: str) -> None:
    if given.lower() != "identity":
        raise MediaUnsupported(f"a body with Content-Encoding {given!r} is not read: send it without")


async def _cap(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in chunks; counts for itself, because a chunked request announces no length."""
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit_bytes:
            raise ImageTooLarge(f"the body has more than {limit_bytes} bytes, no more are taken: send a smaller file")
        yield chunk


async def _read_form(request: Request, limit_bytes: int) -> bytes:
    parser = MultiPartParser(request.headers, _cap(request, limit_bytes), max_files=1, max_fields=_MAX_FIELDS)
    parser.spool_max_size = limit_bytes  # the cap bounds memory, so nothing has to go to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise OptionInvalid(f"the form was refused ({error.message}): send one file, in the field 'file'") from error
    try:
        match form.multi_items():
            case [("file", UploadFile() as upload)]:
                return await upload.read()
            case fields:
                names = ", ".join(repr(name) for name, _ in fields) or "no field"
                raise OptionInvalid(f"the form has {names}, or no file in it: {_EXPECTED}; options go in the query")
    finally:
        await form.close()
