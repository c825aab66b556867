"""The bytes of a request's body, never more of them than the limit."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from model.errors import DeadlineExceeded, ImageTooLarge, InvalidParameter, UnsupportedMediaType, UrlInputUnsupported


async def stream_body(request: Request, max_body_bytes: int, client_timeout_s: float) -> AsyncGenerator[bytes, None]:
    """The body in chunks; counts for itself, because a chunked request announces no length.

    Raises ImageTooLarge as soon as the limit is passed, UnsupportedMediaType for a compressed body, TimeoutError
    after a
    pause of `client_timeout_s`, and ClientDisconnect.
    """
    _check_length(request.headers.get("content-length", ""), max_body_bytes)
    _check_encoding(request.headers.get("content-encoding", "identity"))
    received, stream = 0, request.stream()
    while (chunk := await asyncio.wait_for(anext(stream, None), client_timeout_s)) is not None:
        received += len(chunk)
        if received > max_body_bytes:
            raise ImageTooLarge(f"the body has more than {max_body_bytes} bytes: send a smaller file")
        yield chunk


def _check_length(given: str, max_body_bytes: int) -> None:
    if given.isdecimal() and int(given) > max_body_bytes:
        raise ImageTooLarge(f"the body has {given} bytes, at most {max_body_bytes} are taken: send a smaller file")


def _check_encoding(given: str) -> None:
    if given.lower() != "identity":
        raise UnsupportedMediaType(f"a body with Content-Encoding {given!r} is not read: send it without")


MAX_IMAGES = 32
"""In one request."""
_MAX_FIELDS = 8
_BASE64_STRIDE = 1 << 20
_EXPECTED = (
    "send multipart/form-data with pictures in the field 'file', a picture itself as image/*,"
    ' or application/json {"inputs": base64}'
)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One picture, as it came."""

    content: bytes
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """All of a request."""

    files: tuple[Upload, ...]
    is_batch: bool
    """Whether each is answered with a status of its own."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Options that came in the body."""


async def read_uploads(request: Request, max_body_bytes: int, deadline: float, client_timeout_s: float) -> Uploads:
    """The pictures of a request; what type they claim to be does not matter.

    Raises ImageTooLarge as soon as the limit is passed, UnsupportedMediaType, InvalidParameter for a body without a
    picture or
    with too many, UrlInputUnsupported, DeadlineExceeded (`deadline` on the event loop's clock; `client_timeout_s`
    is the
    longest pause in
    between), and ClientDisconnect.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        async with asyncio.timeout_at(deadline):
            if media == "multipart/form-data":
                return await _read_form(request, max_body_bytes, client_timeout_s)
            if media == "application/json":
                content = await _read_body(request, max_body_bytes, client_timeout_s)
                return await asyncio.to_thread(parse_json_body, content)
            if media == "application/octet-stream" or media.startswith("image/"):
                content = await _read_body(request, max_body_bytes, client_timeout_s)
                return Uploads(files=(Upload(content=content),), is_batch=False)
    except TimeoutError as error:
        raise DeadlineExceeded("the body did not arrive within the time limit: send a smaller picture") from error
    raise UnsupportedMediaType(f"a body of type {media or '(none)'!r} is not read: {_EXPECTED}")


def parse_json_body(content: bytes) -> Uploads:
    """The pictures and options of `{"inputs": base64 or a list of it, "parameters": {...}}`, as Hugging Face has it.

    Raises InvalidParameter for anything else, UrlInputUnsupported for an address in place of base64.
    """
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f'the body is no JSON ({error}): send {{"inputs": base64}}') from error
    if not isinstance(body, dict) or "inputs" not in body or not body.keys() <= {"inputs", "parameters"}:
        raise InvalidParameter('the body must be an object of "inputs" and, if any, "parameters"')
    inputs, parameters = body["inputs"], body.get("parameters") or {}
    texts = inputs if isinstance(inputs, list) else [inputs]
    if not isinstance(parameters, dict) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidParameter('"inputs" must be base64 or a list of it, "parameters" an object')
    if len(texts) > MAX_IMAGES:
        raise InvalidParameter(f"{len(texts)} pictures in one request, at most {MAX_IMAGES} are taken")
    files = tuple(Upload(content=decode_base64(text)) for text in texts)
    return Uploads(files=files, is_batch=isinstance(inputs, list), parameters=parameters)


def decode_base64(text: str) -> bytes:
    """The bytes of base64 or of a `data:` address. Raises InvalidParameter, and UrlInputUnsupported for an address
    to fetch."""
    if text[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise UrlInputUnsupported(
            "an address was given in place of a picture, and nothing is fetched: send the picture itself"
        )
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        # In strides, so that other threads get their turns: a call holds the interpreter throughout.
        strides = range(0, len(text), _BASE64_STRIDE)
        return b"".join(base64.b64decode(text[start : start + _BASE64_STRIDE], validate=True) for start in strides)
    except (binascii.Error, ValueError) as error:
        raise InvalidParameter(
            f"a picture is no base64 ({error}): send it as RFC 4648 has it, without breaks"
        ) from error


async def _read_body(request: Request, max_body_bytes: int, client_timeout_s: float) -> bytes:
    return b"".join([chunk async for chunk in stream_body(request, max_body_bytes, client_timeout_s)])


async def _read_form(request: Request, max_body_bytes: int, client_timeout_s: float) -> Uploads:
    stream = stream_body(request, max_body_bytes, client_timeout_s)
    parser = MultiPartParser(request.headers, stream, max_files=MAX_IMAGES, max_fields=_MAX_FIELDS)
    parser.spool_max_size = max_body_bytes  # the cap bounds memory, so nothing has to go to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidParameter(f"the form was refused ({error.message}): send files in the field 'file'") from error
    try:
        fields = form.multi_items()
        files = [upload for name, upload in fields if name == "file" and isinstance(upload, UploadFile)]
        if not files or len(files) < len(fields):
            names = ", ".join(repr(name) for name, _ in fields) or "no field"
            raise InvalidParameter(f"the form has {names}, or no file in it: {_EXPECTED}; options go in the query")
        uploads = tuple([Upload(content=await each.read(), name=each.filename) for each in files])
        return Uploads(files=uploads, is_batch=len(uploads) > 1)
    finally:
        await form.close()
