"""`POST /v1/segment`: segment one image or a batch of images."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Contract
from model.errors import DeadlineExceeded, InputError, InvalidParameter, NotReady, QueueFull
from service.inference.pipeline import Pipeline, SegmentationResult
from service.middleware.request_context import SEGMENT_ROUTE
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
from service.responses.encoders import (
    ImageResponse,
    MediaType,
    compose_response,
    encode_result,
    negotiate_media_type,
)
from service.responses.problems import Responses, document_problems, make_problem, reference
from service.responses.schemas import (
    BatchResponse,
    FeatureCollection,
    HuggingFaceMask,
    MultiTaskResponse,
    SegmentationResponse,
)
from service.rollout.router import Route
from service.routes.dependencies import API_KEY
from service.state import AppState
from service.telemetry.recorders import StageTimer

_NOT_STARTED = (QueueFull, NotReady, DeadlineExceeded)


def _binary(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary", "description": description}}


_HEADERS = {
    "Server-Timing": {"description": "Milliseconds of each stage.", "schema": {"type": "string"}},
    "X-Model-Version": {"description": "Version of the model.", "schema": {"type": "string"}},
    "X-Image-Warnings": {"description": "What was ignored in the image, if anything.", "schema": {"type": "string"}},
    "X-Request-ID": {"description": "Id of the request: the client's or a new one.", "schema": {"type": "string"}},
}
_ARCHIVES = {
    "application/zip": _binary("`formats` of each image; with `png`, a COCO panoptic dataset."),
    "multipart/mixed": _binary("`formats` of each image, with `X-Item-Index`, `X-Item-Status` and `X-Item-Task`."),
}
_RESPONSES: Responses = {
    200: {
        "description": "The segments, in the format that `Accept` selects. Several images or tasks are available as"
        " JSON, zip and multipart only.",
        "headers": _HEADERS,
        "content": {
            "application/json": {"schema": reference(SegmentationResponse, MultiTaskResponse, BatchResponse)},
            "image/png": _binary("COCO panoptic PNG: id = R + 256 G + 65536 B, 0 is void."),
            "image/jpeg": _binary("The image with colored segments."),
            "application/geo+json": {"schema": reference(FeatureCollection)},
            'image/png;profile="clusters"': _binary("Cluster id of each pixel, 0 is void; 16 bits if above 255."),
            "application/x-npz": _binary("NumPy arrays: label_map, ids, clusters, scores, …"),
            "application/vnd.hf.image-segmentation+json": {
                "schema": {"type": "array", "items": reference(HuggingFaceMask)}
            },
            **_ARCHIVES,
        },
    },
    207: {
        "description": "Some images of a batch failed; the others have results.",
        "headers": _HEADERS,
        "content": {"application/json": {"schema": reference(BatchResponse)}, **_ARCHIVES},
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
    state: AppState = request.app.state.useg
    traffic = state.model_repository.get(parameters.model)
    timer = StageTimer(state.telemetry)
    request.state.task, request.state.version_stats, request.state.timer = parameters.tasks[0], traffic.stats, timer
    with traffic.admit(context) as route:
        with timer.time("read"):
            uploads = await read_uploads(request, context.deadline)
        job = _make_job(request, parameters, uploads, timer, route)
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
    state: AppState = request.app.state.useg
    pipeline = state.model_repository.get_ready_pipeline()
    with pipeline.admit(context):
        uploads = await read_uploads(request, context.deadline)
        if uploads.is_batch:
            raise InvalidParameter("several images: send one")
        work = pipeline.offload(partial(pipeline.render_photo, uploads.files[0].content, longest_edge))
        content = await cancel_on_disconnect(request, work, context.deadline)
    return Response(content, media_type="image/jpeg")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to do for one request, on whichever version it is routed to."""

    request: Request
    uploads: Uploads
    options: SegmentOptions
    media_type: MediaType
    timer: StageTimer
    route: Route

    async def run(self, pipeline: Pipeline, context: RequestContext) -> Response:
        """Return the response of one version.

        Raises any error of a single image. In a batch each image fails by itself, unless none was started, or an error
        that is not the client's can be retried on another version.
        """
        self.request.state.version_stats = pipeline.stats
        contract = pipeline.contract
        self.options.select_classes(contract)
        if self.uploads.is_batch:
            images = await self._segment_batch(pipeline, context, contract)
        else:
            images = [await self._segment(self.uploads.files[0], pipeline, context, contract)]
        compose = partial(compose_response, images, contract, self.media_type, is_batch=self.uploads.is_batch)
        encoded = await pipeline.offload(compose)
        headers = {
            "Vary": "Accept",
            "Server-Timing": self.timer.render(),
            "X-Model-Version": quote(contract.version, safe="+"),
        }
        if encoded.warnings:
            headers["X-Image-Warnings"] = "; ".join(encoded.warnings)
        return Response(encoded.content, encoded.status, headers, encoded.media_type)

    async def _segment(
        self, upload: Upload, pipeline: Pipeline, context: RequestContext, contract: Contract
    ) -> ImageResponse:
        def encode(result: SegmentationResult) -> ImageResponse:
            return ImageResponse(
                name=upload.name,
                size=(result.image.height, result.image.width),
                parts=encode_result(result, contract, self.options, self.media_type),
                warnings=result.image.warnings,
            )

        return await pipeline.run(upload.content, self.options, encode, context, self.timer, contract)

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


def _make_job(
    request: Request, parameters: SegmentParameters, uploads: Uploads, timer: StageTimer, route: Route
) -> _Job:
    """Decide on the options and the media type. Raises InvalidParameter and NotAcceptable."""
    options = parameters.merge(uploads.options) if uploads.options else parameters
    request.state.task = options.tasks[0]
    accept = ",".join(request.headers.getlist("accept"))
    media_type = negotiate_media_type(accept, is_multiple=uploads.is_batch or len(options.tasks) > 1)
    return _Job(request=request, uploads=uploads, options=options, media_type=media_type, timer=timer, route=route)


def _raise_common_error(results: Sequence[ImageResponse | Exception], *, is_final: bool) -> None:
    """Raise the first error if no image was started, or if another version may succeed where this one failed."""
    errors = [result for result in results if isinstance(result, Exception)]
    if len(errors) == len(results) and all(isinstance(error, _NOT_STARTED) for error in errors):
        raise errors[0]
    server_errors = [error for error in errors if not isinstance(error, InputError)]
    if server_errors and not is_final:
        raise server_errors[0]
