"""The pictures in a request: the body itself, the files of a form, or base64 in JSON."""

import asyncio
import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from model.errors import DeadlinePassed, MediaUnsupported, OptionInvalid, UrlRefused
from service.requests.body import stream_body

MOST_PICTURES = 32
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


async def read_uploads(request: Request, limit_bytes: int, deadline: float, stall_s: float) -> Uploads:
    """The pictures of a request; what type they claim to be does not matter.

    Raises ImageTooLarge as soon as the limit is passed, MediaUnsupported, OptionInvalid for a body without a picture or
    with too many, UrlRefused, DeadlinePassed (`deadline` on the event loop's clock; `stall_s` is the longest pause in
    between), and ClientDisconnect.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        async with asyncio.timeout_at(deadline):
            if media == "multipart/form-data":
                return await _read_form(request, limit_bytes, stall_s)
            if media == "application/json":
                content = await _read_whole(request, limit_bytes, stall_s)
                return await asyncio.to_thread(parse_json, content)
            if media == "application/octet-stream" or media.startswith("image/"):
                content = await _read_whole(request, limit_bytes, stall_s)
                return Uploads(files=(Upload(content=content),), is_batch=False)
    except TimeoutError as error:
        raise DeadlinePassed("the body did not arrive within the time limit: send a smaller picture") from error
    raise MediaUnsupported(f"a body of type {media or '(none)'!r} is not read: {_EXPECTED}")


def parse_json(content: bytes) -> Uploads:
    """The pictures and options of `{"inputs": base64 or a list of it, "parameters": {...}}`, as Hugging Face has it.

    Raises OptionInvalid for anything else, UrlRefused for an address in place of base64.
    """
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise OptionInvalid(f'the body is no JSON ({error}): send {{"inputs": base64}}') from error
    if not isinstance(body, dict) or "inputs" not in body or not body.keys() <= {"inputs", "parameters"}:
        raise OptionInvalid('the body must be an object of "inputs" and, if any, "parameters"')
    inputs, parameters = body["inputs"], body.get("parameters") or {}
    texts = inputs if isinstance(inputs, list) else [inputs]
    if not isinstance(parameters, dict) or not texts or not all(isinstance(text, str) for text in texts):
        raise OptionInvalid('"inputs" must be base64 or a list of it, "parameters" an object')
    if len(texts) > MOST_PICTURES:
        raise OptionInvalid(f"{len(texts)} pictures in one request, at most {MOST_PICTURES} are taken")
    files = tuple(Upload(content=decode_base64(text)) for text in texts)
    return Uploads(files=files, is_batch=isinstance(inputs, list), parameters=parameters)


def decode_base64(text: str) -> bytes:
    """The bytes of base64 or of a `data:` address. Raises OptionInvalid, and UrlRefused for an address to fetch."""
    if text[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise UrlRefused("an address was given in place of a picture, and nothing is fetched: send the picture itself")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        # In strides, so that other threads get their turns: a call holds the interpreter throughout.
        strides = range(0, len(text), _BASE64_STRIDE)
        return b"".join(base64.b64decode(text[start : start + _BASE64_STRIDE], validate=True) for start in strides)
    except (binascii.Error, ValueError) as error:
        raise OptionInvalid(f"a picture is no base64 ({error}): send it as RFC 4648 has it, without breaks") from error


async def _read_whole(request: Request, limit_bytes: int, stall_s: float) -> bytes:
    return b"".join([chunk async for chunk in stream_body(request, limit_bytes, stall_s)])


async def _read_form(request: Request, limit_bytes: int, stall_s: float) -> Uploads:
    stream = stream_body(request, limit_bytes, stall_s)
    parser = MultiPartParser(request.headers, stream, max_files=MOST_PICTURES, max_fields=_MAX_FIELDS)
    parser.spool_max_size = limit_bytes  # the cap bounds memory, so nothing has to go to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise OptionInvalid(f"the form was refused ({error.message}): send files in the field 'file'") from error
    try:
        fields = form.multi_items()
        files = [upload for name, upload in fields if name == "file" and isinstance(upload, UploadFile)]
        if not files or len(files) < len(fields):
            names = ", ".join(repr(name) for name, _ in fields) or "no field"
            raise OptionInvalid(f"the form has {names}, or no file in it: {_EXPECTED}; options go in the query")
        uploads = tuple([Upload(content=await each.read(), name=each.filename) for each in files])
        return Uploads(files=uploads, is_batch=len(uploads) > 1)
    finally:
        await form.close()
