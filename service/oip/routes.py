"""The Open Inference Protocol v2 under `/v2`, for clients of Triton, KServe and others."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from model.errors import InvalidParameter, NotReady
from service.inference.pipeline import Pipeline
from service.oip.inference import infer_images, parse_infer_parameters, read_infer_request, version_statistics
from service.oip.schemas import (
    INPUTS,
    OUTPUTS,
    InferRequest,
    InferResponse,
    ModelMetadata,
    OipError,
    RepositoryEntry,
    ServerMetadata,
    TensorMetadata,
)
from service.oip.tensors import LENGTH_HEADER, list_outputs
from service.requests import RequestContext, cancel_on_disconnect, parse_request_context
from service.responses.problems import OIP_PREFIX, Responses, reference
from service.rollout.router import Route, TrafficRouter
from service.routes.dependencies import API_KEY
from service.state import get_state
from service.telemetry.recorders import StageTimer

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_NO_REGISTRY = "this server serves a single artifact: models are not loaded or unloaded on request"
_HAS_REGISTRY = "versions follow the registry: POST /v1/models/NAME/active, canary, shadow, promote or rollback"
_LOADED_STATES = ("active", "canary", "shadow", "standby", "missing_from_registry")
_TRITON_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "INT32": "TYPE_INT32"}
_BINARY = {"schema": {"type": "string", "format": "binary", "description": "JSON, then tensors."}}


def _errors(*statuses: int) -> Responses:
    content = {"application/json": {"schema": reference(OipError)}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


_MODEL_ERRORS = _errors(404, 422, 503)
_READY_ERRORS: Responses = _errors(404, 422) | {503: {"description": "Not ready"}}


_INFER_RESPONSES: Responses = {
    200: {
        "description": "The requested outputs; binary tensors follow the JSON.",
        "headers": {LENGTH_HEADER: {"description": "Bytes of JSON before the tensors.", "schema": {"type": "integer"}}},
        "content": {"application/json": {"schema": reference(InferResponse)}, "application/octet-stream": _BINARY},
    },
    **_errors(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}
_INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": reference(InferRequest)},
            "application/octet-stream": _BINARY,
        },
    }
}

health_router = APIRouter(prefix=OIP_PREFIX, tags=["Open Inference Protocol v2"], responses=_errors(431))
router = APIRouter(
    prefix=OIP_PREFIX, tags=["Open Inference Protocol v2"], dependencies=API_KEY, responses=_errors(401, 431)
)


@health_router.get("/health/live")
async def health_live() -> dict[str, bool]:
    """Report that the process responds."""
    return {"live": True}


@health_router.get("/health/ready", responses={503: {"description": "Not ready"}})
async def health_ready(request: Request, response: Response) -> dict[str, bool]:
    """Report whether images are accepted; 503 if not."""
    try:
        get_state(request).model_repository.get_ready_pipeline()
    except NotReady:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return {"ready": False}
    return {"ready": True}


@router.get("")
@router.get("/", include_in_schema=False)
async def server_metadata(request: Request) -> ServerMetadata:
    """Return name, version and extensions of the server."""
    return ServerMetadata(name="useg", version=request.app.version, extensions=list(EXTENSIONS))


@router.get("/models/stats", responses=_errors(404, 503))
@router.get("/models/{name}/stats", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/stats", responses=_MODEL_ERRORS)
async def model_statistics(request: Request, name: str | None = None, version: str | None = None) -> dict[str, Any]:
    """Return the statistics of a version, of all loaded versions of a model, or of all models."""
    if name is None:
        routers = list(get_state(request).model_repository.list_routers().values())
        pipelines = [pipeline for router in routers for pipeline in router.list_pipelines()]
    elif version is None:
        pipelines = _get_router(request, name).list_pipelines()
    else:
        pipelines = [_get_pipeline(request, name, version)]
    return {"model_stats": [version_statistics(pipeline) for pipeline in pipelines]}


@router.get("/models/{name}", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}", responses=_MODEL_ERRORS)
async def model_metadata(request: Request, name: str, version: str | None = None) -> ModelMetadata:
    """Return inputs and outputs of a model; -1 is any length.

    A request has one of the inputs: encoded files, or pixels in the order of channels that the name says.
    """
    contract = _get_pipeline(request, name, version).contract
    return ModelMetadata(
        name=contract.name,
        versions=_get_router(request, name).list_versions(),
        platform="onnx_onnxv1",
        inputs=[TensorMetadata(name=each, datatype=kind, shape=shape) for each, (kind, shape) in INPUTS.items()],
        outputs=[TensorMetadata(name=each, datatype=kind, shape=shape) for each, (kind, shape) in OUTPUTS.items()],
    )


@router.get("/models/{name}/config", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/config", responses=_MODEL_ERRORS)
async def model_config(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Return Triton's configuration of a model; its `max_batch_size` of 0 says that a request has no batch axis.

    Its parameters name the backend in use, and why faster ones are not.
    """
    pipeline = _get_pipeline(request, name, version)
    model = next(each for each in _get_router(request, name).list_models() if each.pipeline is pipeline)
    contract = pipeline.contract
    return {
        "name": contract.name,
        "platform": "onnxruntime_onnx",
        "backend": "useg",
        "max_batch_size": 0,
        "input": [
            {"name": each, "data_type": _TRITON_TYPES[kind], "dims": shape, "optional": each != "image"}
            for each, (kind, shape) in INPUTS.items()
        ],
        "output": [
            {"name": each, "data_type": _TRITON_TYPES[kind], "dims": shape} for each, (kind, shape) in OUTPUTS.items()
        ],
        "parameters": {
            "backend": {"string_value": model.backend},
            **{f"skipped_backends.{each}": {"string_value": why} for each, why in model.skipped_backends.items()},
        },
    }


@router.get("/models/{name}/ready", responses=_READY_ERRORS)
@router.get("/models/{name}/versions/{version}/ready", responses=_READY_ERRORS)
async def model_ready(request: Request, response: Response, name: str, version: str | None = None) -> dict[str, Any]:
    """Report whether a model accepts images; 503 if not."""
    is_ready = not get_state(request).model_repository.is_draining
    try:
        _get_pipeline(request, name, version)
    except NotReady:
        is_ready = False
    if not is_ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return {"name": name, "ready": is_ready}


@router.post("/repository/index", responses=_errors(429, 503))
async def repository_index(request: Request) -> list[RepositoryEntry]:
    """List all models with all their versions."""
    statuses = await asyncio.to_thread(get_state(request).model_repository.list_statuses)
    return [
        RepositoryEntry(
            name=model.name,
            version=each.version,
            state="READY" if each.state in _LOADED_STATES else "LOADING" if each.state == "loading" else "UNAVAILABLE",
            reason=each.reason or (each.state if each.state in ("unloaded", "failed") else ""),
        )
        for model in statuses
        for each in model.versions
    ]


@router.post("/repository/models/{name}/load", responses=_errors(404, 422, 429, 503))
@router.post("/repository/models/{name}/unload", responses=_errors(404, 422, 429, 503))
async def reject_repository_change(request: Request, name: str) -> Response:
    """Not supported: the response says how to change what is served."""
    _get_pipeline(request, name, None)
    has_registry = get_state(request).model_repository.registry is not None
    raise InvalidParameter(_HAS_REGISTRY if has_registry else _NO_REGISTRY)


@router.post("/models/{name}/infer", responses=_INFER_RESPONSES, openapi_extra=_INFER_BODY, response_class=Response)
@router.post(
    "/models/{name}/versions/{version}/infer",
    responses=_INFER_RESPONSES,
    openapi_extra=_INFER_BODY,
    response_class=Response,
)
async def infer(
    request: Request,
    context: Annotated[RequestContext, Depends(parse_request_context)],
    name: str,
    version: str | None = None,
) -> Response:
    """Segment the images of the tensor `image`, `image_rgb` or `image_bgr`.

    The outputs `panoptic`, `instance` and `semantic` hold the JSON of `/v1/segment` for each image; `panoptic_ids`, for
    images of one size, holds the segment ids of their pixels. Without `outputs`, all are returned.
    """
    state = get_state(request)
    router = _get_router(request, name)
    timer = StageTimer(state.telemetry)
    request.state.version_stats, request.state.timer = router.stats, timer
    admitted = (
        router.admit(context) if version is None else _admit_version(_get_pipeline(request, name, version), context)
    )
    with admitted as route:
        with timer.time("read"):
            infer_request, images = await read_infer_request(request, context.deadline)
        outputs = list_outputs(infer_request)
        own_context, options = parse_infer_parameters(infer_request, outputs, context)

        async def run(pipeline: Pipeline, context: RequestContext) -> tuple[bytes, int | None]:
            request.state.version_stats = pipeline.stats
            return await infer_images(pipeline, images, outputs, options, context, timer, infer_request)

        work = replace(route, context=own_context).run(run)
        content, json_length = await cancel_on_disconnect(request, work, own_context.deadline)
    router.mirror(images)
    headers = {"Server-Timing": timer.render()}
    if json_length is None:
        return Response(content, HTTPStatus.OK, headers, "application/json")
    return Response(content, HTTPStatus.OK, headers | {LENGTH_HEADER: str(json_length)}, "application/octet-stream")


def _get_router(request: Request, name: str) -> TrafficRouter:
    return get_state(request).model_repository.get(name)


def _get_pipeline(request: Request, name: str, version: str | None) -> Pipeline:
    """Return a version, by default the active one. Raises ModelNotFound, and NotReady if no version is active."""
    router = _get_router(request, name)
    active = router.get_pipeline()
    return active if version is None else router.find_version(version)


@contextmanager
def _admit_version(pipeline: Pipeline, context: RequestContext) -> Iterator[Route]:
    with pipeline.admit(context):
        yield Route(pipeline=pipeline, fallback=None, context=context)
