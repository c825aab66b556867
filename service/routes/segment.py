"""`POST /v1/segment`: segment one image or a batch of images."""

import asyncio
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, get_args
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Contract, Task
from model.errors import DeadlineExceeded, InputError, InvalidParameter, NotAcceptable, NotReady, QueueFull
from model.formats.coco import to_coco_dataset
from service.inference.pipeline import (
    MediaType,
    Pipeline,
    ResponsePart,
    SegmentationResult,
    encode_result,
    model_to_json,
)
from service.metrics import RequestRecord
from service.middleware import API_KEY, SEGMENT_ROUTE, get_state
from service.problems import Responses, document_problems, make_problem, reference
from service.requests import (
    MAX_EDGE_PX,
    MAX_IMAGES,
    MIN_EDGE_PX,
    RequestContext,
    SegmentJsonBody,
    SegmentOptions,
    SegmentParameters,
    Upload,
    Uploads,
    cancel_on_disconnect,
    parse_request_context,
    read_uploads,
)
from service.rollout.router import Route
from service.schemas import (
    BatchResponse,
    MultiTaskResponse,
    SegmentationResponse,
)

MEDIA_TYPES: tuple[MediaType, ...] = get_args(MediaType)
"""Media types of a single result; the first is the default, and the earlier of equal quality is chosen."""
MULTI_RESULT_MEDIA_TYPES: tuple[MediaType, ...] = ("application/json", "application/zip")
"""Media types of several images or tasks."""
_NOT_STARTED = (QueueFull, NotReady, DeadlineExceeded)
_DEFAULT_PROFILES = {"image/png": "coco-panoptic"}
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time in a zip file: equal results are equal bytes."""
_COCO_FILES = {".png": ".json", ".instances.json": ".instances.json", ".polygons.json": ".polygons.json"}
"""File suffix of the COCO JSON of all images in a zip, by the suffix of the parts that it lists."""


def _document(kind: str, description: str) -> dict[str, Any]:
    return {"schema": {"type": kind, "description": description}}


def _binary(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary", "description": description}}


_HEADERS = {
    "Server-Timing": {"description": "Milliseconds of each stage.", "schema": {"type": "string"}},
    "X-Model-Version": {"description": "Version of the model.", "schema": {"type": "string"}},
    "X-Image-Warnings": {"description": "What was ignored in the image, if anything.", "schema": {"type": "string"}},
    "X-Request-ID": {"description": "Id of the request: the client's or a new one.", "schema": {"type": "string"}},
}
_ZIP = {"application/zip": _binary("`formats` of each image; with `png`, a COCO panoptic dataset.")}
_RESPONSES: Responses = {
    200: {
        "description": "The segments, in the format that `Accept` selects. Several images or tasks are available as"
        " JSON and zip only.",
        "headers": _HEADERS,
        "content": {
            "application/json": {"schema": reference(SegmentationResponse, MultiTaskResponse, BatchResponse)},
            "image/png": _binary("COCO panoptic PNG: id = R + 256 G + 65536 B, 0 is void."),
            "image/jpeg": _binary("The image with colored segments."),
            "application/geo+json": _document("object", "GeoJSON (RFC 7946), one multipolygon per segment, in pixels."),
            'image/png;profile="clusters"': _binary("Cluster id of each pixel, 0 is void; 16 bits if above 255."),
            "application/x-npz": _binary("NumPy arrays: label_map, ids, clusters, scores, …"),
            "application/vnd.hf.image-segmentation+json": _document(
                "array", "As from Hugging Face's API: `label`, `score`, and `mask` as a grayscale PNG in base64."
            ),
            **_ZIP,
        },
    },
    207: {
        "description": "Some images of a batch failed; the others have results.",
        "headers": _HEADERS,
        "content": {"application/json": {"schema": reference(BatchResponse)}, **_ZIP},
    },
    **document_problems(401, 404, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504),
}
_PHOTO_RESPONSES: Responses = {
    200: {"description": "The image.", "content": {"image/jpeg": _binary("As it is segmented.")}},
    **document_problems(401, 408, 413, 415, 422, 429, 431, 500, 503, 504),
}
_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "JPEG, PNG, WebP, HEIC, AVIF, JPEG 2000, GIF, BMP or TIFF: one image by itself,"
        " or one or more in a form or in JSON.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "array", "items": _FILE, "maxItems": MAX_IMAGES}},
                }
            },
            "application/json": {"schema": reference(SegmentJsonBody)},
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
        },
    }
}

router = APIRouter(tags=["Segmentation"], dependencies=API_KEY)


@router.post(SEGMENT_ROUTE, responses=_RESPONSES, openapi_extra=_BODY, response_class=Response)
async def segment(
    request: Request,
    parameters: Annotated[SegmentParameters, Query()],
    context: Annotated[RequestContext, Depends(parse_request_context)],
) -> Response:
    """Segment one image or a batch of images.

    Send files in the form field `file`, an image as the body, or base64 in JSON. The `Accept` header selects the
    format of the response.
    """
    state = get_state(request)
    traffic = state.model_repository.routers.get(parameters.model)
    record = request.state.record = RequestRecord(state.telemetry, parameters.tasks[0], traffic.stats)
    with traffic.admit(context) as route:
        with record.time("read"):
            uploads = await read_uploads(request)
        options = parameters.merge(uploads.options) if uploads.options else parameters
        record.task = options.tasks[0]
        accept = ",".join(request.headers.getlist("accept"))
        media_type = negotiate_media_type(accept, is_multiple=uploads.is_batch or len(options.tasks) > 1)
        job = _Job(request=request, uploads=uploads, options=options, media_type=media_type, record=record, route=route)
        response = await cancel_on_disconnect(request, route.run(job.run), context.deadline)
    traffic.mirror(upload.content for upload in uploads.files)
    return response


@router.post("/v1/decode", responses=_PHOTO_RESPONSES, openapi_extra=_BODY, response_class=Response)
async def decode(
    request: Request,
    context: Annotated[RequestContext, Depends(parse_request_context)],
    longest_edge: Annotated[
        int | None, Query(ge=MIN_EDGE_PX, le=MAX_EDGE_PX, description="Maximum length of the longer side in pixels.")
    ] = None,
) -> Response:
    """Return an image as it is segmented: upright, in sRGB, the first frame, as JPEG. Masks refer to its pixels.

    Send one image, as to `/v1/segment`.
    """
    pipeline = get_state(request).model_repository.get_ready_pipeline()
    with pipeline.scheduler.admit(context):
        uploads = await read_uploads(request)
        if uploads.is_batch:
            raise InvalidParameter("several images: send one")
        work = pipeline.offload(partial(pipeline.render_photo, uploads.files[0].content, longest_edge))
        content = await cancel_on_disconnect(request, work, context.deadline)
    return Response(content, media_type="image/jpeg")


@dataclass(frozen=True, kw_only=True)
class ImageResponse:
    """The response for one image: its files, or the problem."""

    name: str | None
    """File name that the client sent."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the result."""
    parts: tuple[ResponsePart, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: dict[str, Any] | None = None

    @property
    def status(self) -> int:
        return int(self.problem["status"]) if self.problem else HTTPStatus.OK


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to do for one request, on whichever version it is routed to."""

    request: Request
    uploads: Uploads
    options: SegmentOptions
    media_type: MediaType
    record: RequestRecord
    route: Route

    async def run(self, pipeline: Pipeline, context: RequestContext) -> Response:
        """Return the response of one version.

        Raises any error of a single image. In a batch each image fails by itself, unless none was started, or an error
        that is not the client's can be retried on another version.
        """
        self.record.stats = pipeline.stats
        contract = pipeline.contract
        self.options.select_classes(contract)
        if self.uploads.is_batch:
            images = await self._segment_batch(pipeline, context, contract)
        else:
            images = [await self._segment(self.uploads.files[0], pipeline, context, contract)]
        compose = partial(compose_response, images, contract, self.media_type, is_batch=self.uploads.is_batch)
        content, status = await pipeline.offload(compose)
        headers = {
            "Vary": "Accept",
            "Server-Timing": self.record.render(),
            "X-Model-Version": quote(contract.version, safe="+"),
        }
        if images[0].warnings and not self.uploads.is_batch:
            headers["X-Image-Warnings"] = "; ".join(images[0].warnings)
        return Response(content, status, headers, self.media_type)

    async def _segment(
        self, upload: Upload, pipeline: Pipeline, context: RequestContext, contract: Contract
    ) -> ImageResponse:
        def encode(result: SegmentationResult) -> ImageResponse:
            return ImageResponse(
                name=upload.name,
                size=(result.image.height, result.image.width),
                parts=encode_result(result, self.options, self.media_type),
                warnings=result.image.warnings,
            )

        return await pipeline.run(upload.content, self.options, encode, context, self.record, contract)

    async def _segment_batch(
        self, pipeline: Pipeline, context: RequestContext, contract: Contract
    ) -> list[ImageResponse]:
        """Return the response for each image; a few run at a time, so that other requests have room."""
        slots = asyncio.Semaphore(pipeline.max_concurrent_images)

        async def segment_one(upload: Upload) -> ImageResponse | Exception:
            async with slots:
                try:
                    return await self._segment(upload, pipeline, context, contract)
                except Exception as error:  # of any kind: the other images have results
                    return error

        results = await asyncio.gather(*(segment_one(upload) for upload in self.uploads.files))
        _raise_common_error(results, is_final=self.route.is_final(pipeline))
        return [
            ImageResponse(name=upload.name, problem=make_problem(result, self.request.state.request_id))
            if isinstance(result, Exception)
            else result
            for upload, result in zip(self.uploads.files, results, strict=True)
        ]


def _raise_common_error(results: Sequence[ImageResponse | Exception], *, is_final: bool) -> None:
    """Raise the first error if no image was started, or if another version may succeed where this one failed."""
    errors = [result for result in results if isinstance(result, Exception)]
    if len(errors) == len(results) and all(isinstance(error, _NOT_STARTED) for error in errors):
        raise errors[0]
    server_errors = [error for error in errors if not isinstance(error, InputError)]
    if server_errors and not is_final:
        raise server_errors[0]


def negotiate_media_type(accept: str, *, is_multiple: bool = False) -> MediaType:
    """Return the best media type for an `Accept` header (RFC 9110, section 12.5.1).

    Only the parameters `q` and `profile` are used; a range with a malformed `q` is not acceptable.
    Raises NotAcceptable if nothing matches.
    """
    offered = MULTI_RESULT_MEDIA_TYPES if is_multiple else MEDIA_TYPES
    if not accept.strip():
        return offered[0]
    ranges = [_parse_media_range(text) for text in accept.split(",") if text.strip()]
    qualities = {media_type: _find_quality(media_type, ranges) for media_type in offered}
    best = max(offered, key=qualities.__getitem__)
    if qualities[best] <= 0.0:
        subject = " of several images or tasks" if is_multiple else ""
        raise NotAcceptable(f"no response{subject} matches 'Accept: {accept}': supported are {', '.join(offered)}")
    return best


def _parse_media_range(text: str) -> tuple[str, dict[str, str]]:
    """Return the media type in lower case, and its parameters by name."""
    name, *parameters = (piece.strip() for piece in text.split(";"))
    pairs = (piece.partition("=")[::2] for piece in reversed(parameters))  # of equal names the first counts
    return name.lower(), {key.lower(): value.strip('" ') for key, value in pairs}


def _find_quality(media_type: MediaType, ranges: Sequence[tuple[str, dict[str, str]]]) -> float:
    """Return the quality of the most specific range that matches, the last of equally specific ones; 0 for none."""
    name, own = _parse_media_range(media_type)
    profile = own.get("profile", _DEFAULT_PROFILES.get(name))
    best, best_quality = 0, 0.0
    for range_name, parameters in ranges:
        specificity = {name: 3, f"{name.split('/')[0]}/*": 2, "*/*": 1}.get(range_name, 0)
        if "profile" in parameters:
            specificity = 4 if (range_name, parameters["profile"]) == (name, profile) else 0
        if specificity and specificity >= best:
            quality = parameters.get("q", "1")
            best, best_quality = specificity, float(quality) if _QUALITY.fullmatch(quality) else 0.0
    return best_quality


def compose_response(
    images: Sequence[ImageResponse], contract: Contract, media_type: MediaType, *, is_batch: bool
) -> tuple[bytes, int]:
    """Return body and status of a response; that to a batch has the status of each image, and is 207 if one failed."""
    status = HTTPStatus.MULTI_STATUS if any(image.problem for image in images) else HTTPStatus.OK
    if media_type == "application/zip":
        return _encode_zip(images, contract), status
    if is_batch:
        return _encode_batch_json(images, contract), status
    return images[0].parts[0].content, status


def _image_status(index: int, image: ImageResponse) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": index, "name": image.name, "status": image.status}
    return entry | ({"error": image.problem} if image.problem else {})


def _encode_batch_json(images: Sequence[ImageResponse], contract: Contract) -> bytes:
    entries = [
        _image_status(index, image) | ({"result": orjson.Fragment(image.parts[0].content)} if image.parts else {})
        for index, image in enumerate(images)
    ]
    return orjson.dumps({"model": model_to_json(contract), "results": entries})


def _encode_zip(images: Sequence[ImageResponse], contract: Contract) -> bytes:
    """Encode one folder per task, and next to it a COCO JSON file of all images for each of COCO's formats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        coco: dict[tuple[Task | None, str], list[tuple[int, ResponsePart]]] = {}
        for index, image in enumerate(images):
            for part in image.parts:
                if part.content:
                    _add_to_zip(archive, f"{part.task}/{_file_stem(index)}{part.suffix}", part.content)
                if part.annotations is not None:
                    coco.setdefault((part.task, _COCO_FILES[part.suffix]), []).append((index, part))
        for (task, suffix), parts in coco.items():
            _add_to_zip(archive, f"{task}{suffix}", orjson.dumps(_merge_coco(parts, images, contract)))
        statuses = [_image_status(index, image) for index, image in enumerate(images)]
        _add_to_zip(archive, "results.json", orjson.dumps(statuses))
    return buffer.getvalue()


def _merge_coco(
    parts: Sequence[tuple[int, ResponsePart]], images: Sequence[ImageResponse], contract: Contract
) -> dict[str, Any]:
    """Return COCO's JSON of the parts; image ids start at 1, as the file names do."""
    entries, annotations = [], []
    for index, part in parts:
        height, width = images[index].size
        entries.append({"id": index + 1, "file_name": images[index].name or "", "height": height, "width": width})
        ids: dict[str, Any] = {"image_id": index + 1}
        if part.content:
            ids["file_name"] = f"{_file_stem(index)}{part.suffix}"
        annotations += [each | ids for each in part.annotations or ()]
    return to_coco_dataset(contract, entries, annotations)


def _add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    is_text = name.endswith("json")
    entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED)


def _file_stem(index: int) -> str:
    return f"{index + 1:06}"
