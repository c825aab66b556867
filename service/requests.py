"""Parsing of segmentation requests: query parameters, headers and bodies."""

import asyncio
import base64
import sys
import unicodedata
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from email.message import Message
from email.utils import collapse_rfc2231_value
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Header
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from model.contract import Contract, Detail, Task, Thresholds
from model.errors import DeadlineExceeded, InvalidParameter, UnsupportedMediaType, UrlInputUnsupported
from model.postprocessing.panoptic import Segment
from model.validation import did_you_mean
from service.settings import Settings

FormatName = Literal[
    "json", "geojson", "png", "coco-instances", "coco-polygons", "clusters", "overlay", "npz", "huggingface"
]

HIGHEST_PRIORITY, NORMAL_PRIORITY, LOWEST_PRIORITY = 1, 2, 3
MIN_EDGE_PX, MAX_EDGE_PX = 32, 65_500
MAX_CLASSES = 1000
MAX_IMAGES = 32
CLASS_AGNOSTIC_NMS_IOU = 0.5
_MAX_TIMEOUT_MS = 999_999_999
_MAX_FORM_FIELDS = 8
_BASE64_CHUNK = 1 << 20
_SUPPORTED_BODIES = (
    "send multipart/form-data with images in the field 'file', the image itself as image/*,"
    ' or application/json {"inputs": base64}'
)

T = TypeVar("T")


def _list_texts(value: Any) -> Any:
    """Turn one text, or texts and numbers, into a tuple without duplicates; `select_classes` splits at commas."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        return value
    if not entries:
        raise ValueError("send at least one value")
    return tuple(dict.fromkeys(unicodedata.normalize("NFC", str(entry)).strip() for entry in entries))


def _split_commas(value: Any) -> Any:
    """Turn `a,b` and repeated parameters into one tuple without duplicates."""
    texts = _list_texts(value)
    if not isinstance(texts, tuple):
        return value
    return tuple(dict.fromkeys(word.strip() for text in texts for word in text.split(",")))


_CommaSeparated = BeforeValidator(_split_commas)
_Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
_ClassName = Annotated[str, Field(min_length=1)]


class SegmentOptions(BaseModel):
    """Options of a segmentation; None leaves a value to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    task: Annotated[tuple[Task, ...], _CommaSeparated] = ("panoptic",)
    """`panoptic`: things and stuff without overlap; `instance`: things, each with its whole mask; `semantic`: one
    segment per category (see `merge_clusters`). Several tasks, separated by commas, share one run of the network."""
    subtask: Task | None = None
    """Alias of `task`, as in the Hugging Face image-segmentation API."""
    threshold: _Fraction | None = None
    """Minimum detection score (default: the model's). For `task=semantic`, detections above a quarter of it fill
    unlabeled pixels."""
    mask_threshold: _Fraction | None = None
    """Minimum probability of a mask pixel (default: the model's)."""
    overlap_threshold: _Fraction | None = None
    """Leave a detection out of the panoptic result if better ones cover more than this fraction of its mask (default:
    the model's)."""
    overlap_mask_area_threshold: _Fraction | None = None
    """1 - `overlap_threshold`, the minimum visible fraction, as in the Hugging Face image-segmentation API."""
    min_stuff_area_fraction: _Fraction | None = None
    """Minimum area of a stuff region as a fraction of the image (default: the model's)."""
    classes: Annotated[tuple[_ClassName, ...], Field(max_length=MAX_CLASSES), BeforeValidator(_list_texts)] = ()
    """Return only these classes: category names or cluster ids, separated by commas or as repeated parameters
    (default: all). A name that contains a comma is sent as a parameter of its own."""
    merge_clusters: bool = True
    """Merge the clusters of one category into one segment: all in the semantic result, those of stuff in the panoptic
    one. Its `cluster_ids` lists them, the largest first; clusters without a name stay apart. False returns a segment
    for each cluster, as the PNG of `profile="clusters"` always does."""
    longest_edge: Annotated[int, Field(ge=MIN_EDGE_PX, le=MAX_EDGE_PX)] | None = None
    """Maximum length of the longer side of the result in pixels; a larger image is scaled down (default: no limit)."""
    detail: Detail = "standard"
    """`high` also runs the network on overlapping windows at 1.8 times the scale and finds smaller objects, for about
    five times the computation; `low` uses a smaller input, where the model has one."""
    agnostic_nms: bool = False
    """Drop a detection that overlaps a better one of any class (mask IoU above 0.5)."""
    formats: Annotated[tuple[FormatName, ...], _CommaSeparated] = ("json", "png")
    """Files per image and task in an `application/zip` response, separated by commas. `png` is COCO's panoptic format,
    `coco-instances` has RLE masks and `coco-polygons` lists of points; of each of these there is one COCO JSON file of
    all images."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                hint = did_you_mean(str(name), cls.model_fields, f"; known are {', '.join(cls.model_fields)}")
                raise ValueError(f"unknown parameter {name!r}{hint}")
        return given

    @model_validator(mode="after")
    def _reject_aliases(self) -> "SegmentOptions":
        for name, alias in (("task", "subtask"), ("overlap_threshold", "overlap_mask_area_threshold")):
            if {name, alias} <= self.model_fields_set:
                raise ValueError(f"{alias!r} stands for {name!r}: send only one of them")
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in the order of the request."""
        return (self.subtask,) if self.subtask else self.task

    def merge(self, other: "SegmentOptions") -> "SegmentOptions":
        """Return these options and those of `other`, `model` left out. Raises InvalidParameter for one set in both."""
        own, added = (options.model_dump(exclude_unset=True, exclude={"model"}) for options in (self, other))
        if repeated := sorted(own.keys() & added.keys()):
            raise InvalidParameter(f"{repeated[0]!r} is set in the query and in the body: send it once")
        try:
            return SegmentOptions.model_validate(own | added)
        except ValidationError as error:
            raise invalid_request(error) from error

    def override(self, thresholds: Thresholds) -> Thresholds:
        """Return the model's thresholds with those of the request in their place."""
        visible = self.overlap_mask_area_threshold
        chosen = {
            "score_threshold": self.threshold,
            "mask_threshold": self.mask_threshold,
            "overlap_threshold": self.overlap_threshold if visible is None else 1.0 - visible,
            "min_stuff_area_fraction": self.min_stuff_area_fraction,
            "duplicate_iou_threshold": CLASS_AGNOSTIC_NMS_IOU if self.agnostic_nms else None,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return replace(thresholds, **given) if given else thresholds

    def select_classes(self, contract: Contract) -> Callable[[Segment], bool] | None:
        """Return whether a segment is of a requested class, None if all are. Raises InvalidParameter for an unknown
        one."""
        if not self.classes:
            return None
        count = contract.thing_clusters + contract.stuff_clusters
        examples = contract.examples.categories if contract.examples else ()
        known = {str(cluster) for cluster in range(1, count + 1)}
        known |= {category.name for category in (*contract.categories.values(), *examples)}
        entries = [name for entry in self.classes for name in ([entry] if entry in known else entry.split(","))]
        names = {name.strip() for name in entries}
        if unknown := sorted(names - known):
            hint = did_you_mean(unknown[0], known, ":")
            raise InvalidParameter(
                f"unknown class {unknown[0]!r}{hint} send a category name or a cluster id 1..{count}"
            )
        return lambda segment: (
            str(segment.cluster) in names or (segment.category is not None and segment.category.name in names)
        )


class SegmentParameters(SegmentOptions):
    """Query parameters of a segmentation."""

    model: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Name of the model; required if several are served without a default."""


class SegmentJsonBody(BaseModel):
    """Images as base64 in JSON, as in the Hugging Face image-segmentation API."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    inputs: (
        Annotated[str, Field(examples=["iVBORw0KGgo…"])]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)]
    )
    """One image as base64 or a data URL, or a list of them for a batch."""
    parameters: SegmentOptions | None = None
    """The options of the query, except `model`."""


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """Deadline, priority and owner of a request."""

    deadline: float
    """Time of the event loop's clock after which the client does not wait any more."""
    owner: str = ""
    """Name of the API key, or the client's address."""
    priority: int = NORMAL_PRIORITY
    """1 (highest) to 3 (lowest)."""
    routing_key: str = ""
    """Requests with the same key go to the same version during a canary."""


async def parse_request_context(
    request: Request,
    timeout_ms: Annotated[
        int | None,
        Header(
            alias="X-Request-Timeout-Ms",
            ge=1,
            le=_MAX_TIMEOUT_MS,
            description="Request timeout in milliseconds, at most the server's; 504 when exceeded.",
        ),
    ] = None,
    priority: Annotated[
        int,
        Header(
            alias="X-Request-Priority",
            ge=HIGHEST_PRIORITY,
            le=LOWEST_PRIORITY,
            description="Request priority: 1 (highest) to 3 (lowest).",
        ),
    ] = NORMAL_PRIORITY,
    routing_key: Annotated[
        str | None,
        Header(
            alias="X-Routing-Key",
            description="Sticky routing key: requests with the same key go to the same version during a canary"
            " (default: the name of the API key, or the client's address).",
        ),
    ] = None,
) -> RequestContext:
    """Return the context of a request; a FastAPI dependency."""
    settings: Settings = request.app.state.useg.settings
    timeout_s = min(settings.request_timeout_s, timeout_ms / 1000) if timeout_ms else settings.request_timeout_s
    owner: str = request.state.owner
    deadline = request.state.deadline = asyncio.get_running_loop().time() + timeout_s
    return RequestContext(
        deadline=deadline,
        owner=owner,
        priority=priority,
        routing_key=routing_key or owner,
    )


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One encoded image."""

    content: bytes
    name: str | None = None
    """Name of the file, if the client sent one."""


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """The images of a request."""

    files: tuple[Upload, ...]
    is_batch: bool
    """Whether the response holds a status for each image."""
    options: SegmentOptions | None = None
    """Options in a JSON body."""


async def read_uploads(request: Request) -> Uploads:
    """Read the images of a request; the declared type of an image is ignored.

    Raises UnsupportedMediaType, InvalidParameter or RequestValidationError for a malformed body, UrlInputUnsupported,
    ClientDisconnect, and what `RequestMiddleware` raises, such as UploadTimeout at the deadline.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _read_form(request)
    if media_type == "application/json":
        return await asyncio.to_thread(parse_json_body, await request.body())
    if media_type == "application/octet-stream" or media_type.startswith("image/"):
        return Uploads(files=(Upload(content=await request.body()),), is_batch=False)
    raise UnsupportedMediaType(f"unsupported Content-Type {media_type or '(none)'!r}: {_SUPPORTED_BODIES}")


def parse_json_body(content: bytes) -> Uploads:
    """Parse a `SegmentJsonBody`. Raises RequestValidationError, and as `decode_base64`."""
    try:
        body = SegmentJsonBody.model_validate_json(content)
    except ValidationError as error:
        raise invalid_request(error) from error
    texts = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    files = tuple(Upload(content=decode_base64(text)) for text in texts)
    return Uploads(files=files, is_batch=isinstance(body.inputs, list), options=body.parameters)


def decode_base64(text: str) -> bytes:
    """Decode base64 or a `data:` URL. Raises InvalidParameter, and UrlInputUnsupported for any other URL."""
    if text[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise UrlInputUnsupported("image URLs are not supported: send the image itself")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        # In chunks, since a call holds the interpreter lock throughout.
        starts = range(0, len(text), _BASE64_CHUNK)
        return b"".join(base64.b64decode(text[start : start + _BASE64_CHUNK], validate=True) for start in starts)
    except ValueError as error:
        raise InvalidParameter(f"invalid base64 ({error}): use RFC 4648 without line breaks") from error


def invalid_request(error: ValidationError) -> RequestValidationError:
    """Return the error that FastAPI raises for a request that does not match its schema."""
    return RequestValidationError(error.errors(include_url=False, include_input=False))


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T], deadline: float) -> T:
    """Return the result of `work`; the body of the request must have been read.

    Cancels it and raises ClientDisconnect if the client disconnects first, DeadlineExceeded at `deadline` (the event
    loop's clock).
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    timeout_s = deadline - asyncio.get_running_loop().time()
    try:
        await asyncio.wait({task, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ClientDisconnect
        raise DeadlineExceeded("the request timeout passed: send fewer images at once, or try again")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _FormParser(MultiPartParser):
    """Starlette's parser, which also takes a part as a file if only `filename*` (RFC 5987) names it."""

    def on_headers_finished(self) -> None:
        disposition = Message()
        header = self._current_part.content_disposition or b""
        disposition["Content-Disposition"] = header.decode("latin-1")
        name = disposition.get_param("filename", None, "Content-Disposition")
        if isinstance(name, tuple):  # charset, language, name
            plain = collapse_rfc2231_value(name).replace('"', "'")
            self._current_part.content_disposition = header + f'; filename="{plain}"'.encode()
        super().on_headers_finished()


async def _read_form(request: Request) -> Uploads:
    parser = _FormParser(request.headers, request.stream(), max_files=MAX_IMAGES, max_fields=_MAX_FORM_FIELDS)
    parser.spool_max_size = sys.maxsize  # RequestMiddleware bounds the memory, so nothing is written to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidParameter(f"invalid form ({error.message}): send files in the field 'file'") from error
    try:
        fields = form.multi_items()
        files = [upload for name, upload in fields if name == "file" and isinstance(upload, UploadFile)]
        if not files or len(files) < len(fields):
            names = ", ".join(repr(name) for name, _ in fields) or "none"
            raise InvalidParameter(f"unexpected form fields ({names}): {_SUPPORTED_BODIES}; options go in the query")
        uploads = tuple([Upload(content=await file.read(), name=file.filename) for file in files])
        return Uploads(files=uploads, is_batch=len(uploads) > 1)
    finally:
        await form.close()
