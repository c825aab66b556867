"""The Open Inference Protocol v2 under `/v2`, for clients of Triton, KServe and others."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Depends
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Task
from model.errors import InputError, InvalidParameter, NotReady
from service.inference.pipeline import ImageContent, Pipeline, SegmentationResult, result_to_json
from service.metrics import RequestRecord, Stage
from service.middleware import API_KEY, get_state
from service.oip.tensors import (
    IDS_OUTPUT,
    INPUTS,
    LENGTH_HEADER,
    OUTPUTS,
    InferRequest,
    OipError,
    Output,
    OutputName,
    RepositoryEntry,
    encode_infer_response,
    list_outputs,
    parse_infer_request,
)
from service.problems import OIP_PREFIX, Responses, reference
from service.requests import (
    LOWEST_PRIORITY,
    NORMAL_PRIORITY,
    RequestContext,
    SegmentOptions,
    cancel_on_disconnect,
    invalid_request,
    parse_request_context,
)
from service.rollout.router import TrafficRouter

_EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_NO_REGISTRY = "this server serves a single artifact: models are not loaded or unloaded on request"
_HAS_REGISTRY = "versions follow the registry: POST /v1/models/NAME/active, canary, shadow, promote or rollback"
_LOADED_STATES = ("active", "canary", "shadow", "standby", "missing_from_registry")
_STAGES: dict[str, Sequence[Stage]] = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("merge", "encode"),
}
"""Our stages for each of the protocol's, in their order."""
_TRITON_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "INT32": "TYPE_INT32"}
_OUTPUTS_DOCUMENT = {
    "schema": {
        "type": "object",
        "description": "`model_name`, `model_version`, `id` and `outputs`: the JSON response of `/v1/segment`"
        " for each image, or the segment ids of its pixels.",
    }
}
_BINARY = {"schema": {"type": "string", "format": "binary", "description": "JSON, then tensors."}}
_NOT_READY: Responses = {503: {"description": "Not ready"}}


def _errors(*statuses: int) -> Responses:
    content = {"application/json": {"schema": reference(OipError)}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


_MODEL_ERRORS = _errors(404, 422, 503)
_INFER_RESPONSES: Responses = {
    200: {
        "description": "The requested outputs; binary tensors follow the JSON.",
        "headers": {LENGTH_HEADER: {"description": "Bytes of JSON before the tensors.", "schema": {"type": "integer"}}},
        "content": {"application/json": _OUTPUTS_DOCUMENT, "application/octet-stream": _BINARY},
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


@health_router.get("/health/ready", responses=_NOT_READY)
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
async def server_metadata(request: Request) -> dict[str, Any]:
    """Return name, version and extensions of the server."""
    return {"name": "useg", "version": request.app.version, "extensions": _EXTENSIONS}


@router.get("/models/stats", responses=_MODEL_ERRORS)
@router.get("/models/{name}/stats", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/stats", responses=_MODEL_ERRORS)
async def model_statistics(request: Request, name: str | None = None, version: str | None = None) -> dict[str, Any]:
    """Return the statistics of a version since it was loaded, of all loaded versions of a model, or of all models."""
    if name is None:
        routers = get_state(request).model_repository.routers.by_name.values()
        pipelines = [pipeline for router in routers for pipeline in router.list_pipelines()]
    elif version is None:
        pipelines = _get_router(request, name).list_pipelines()
    else:
        pipelines = [_get_router(request, name).get_pipeline(version)]
    return {"model_stats": [_version_statistics(pipeline) for pipeline in pipelines]}


@router.get("/models/{name}", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}", responses=_MODEL_ERRORS)
async def model_metadata(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Return inputs and outputs of a model; -1 is any length.

    A request has one of the inputs: encoded files, or pixels in the order of channels that the name says.
    """
    router = _get_router(request, name)
    return {
        "name": router.get_pipeline(version).contract.name,
        "versions": [each.contract.version for each in router.list_pipelines()],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": each, "datatype": kind, "shape": shape} for each, (kind, shape) in INPUTS.items()],
        "outputs": [{"name": each, "datatype": kind, "shape": shape} for each, (kind, shape) in OUTPUTS.items()],
    }


@router.get("/models/{name}/config", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/config", responses=_MODEL_ERRORS)
async def model_config(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Return Triton's configuration of a model; its `max_batch_size` of 0 says that a request has no batch axis.

    Its parameters name the backend in use, and why faster ones are not.
    """
    pipeline = _get_router(request, name).get_pipeline(version)
    return {
        "name": pipeline.contract.name,
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
            "backend": {"string_value": pipeline.backend},
            **{f"skipped_backends.{each}": {"string_value": why} for each, why in pipeline.skipped_backends.items()},
        },
    }


@router.get("/models/{name}/ready", responses=_errors(404, 422) | _NOT_READY)
@router.get("/models/{name}/versions/{version}/ready", responses=_errors(404, 422) | _NOT_READY)
async def model_ready(request: Request, response: Response, name: str, version: str | None = None) -> dict[str, Any]:
    """Report whether a model accepts images; 503 if not."""
    is_ready = not get_state(request).model_repository.is_draining
    try:
        _get_router(request, name).get_pipeline(version)
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
    _get_router(request, name)
    raise InvalidParameter(_HAS_REGISTRY if get_state(request).model_repository.registry else _NO_REGISTRY)


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
    router = _get_router(request, name)
    record = request.state.record = RequestRecord(get_state(request).telemetry, stats=router.stats)
    with router.admit(context, version) as route:
        with record.time("read"):
            length = request.headers.get(LENGTH_HEADER)
            body = await request.body()
            infer_request, images = await asyncio.to_thread(parse_infer_request, body, length)
        outputs = list_outputs(infer_request)
        own_context, options = parse_infer_parameters(infer_request, outputs, context)

        async def run(pipeline: Pipeline, context: RequestContext) -> tuple[bytes, int | None]:
            record.stats = pipeline.stats
            return await infer_images(pipeline, images, outputs, options, context, record, infer_request)

        work = replace(route, context=own_context).run(run)
        content, json_length = await cancel_on_disconnect(request, work, own_context.deadline)
    router.mirror(images)
    headers = {"Server-Timing": record.render()}
    if json_length is None:
        return Response(content, HTTPStatus.OK, headers, "application/json")
    return Response(content, HTTPStatus.OK, headers | {LENGTH_HEADER: str(json_length)}, "application/octet-stream")


def parse_infer_parameters(
    infer_request: InferRequest, outputs: Iterable[OutputName], context: RequestContext
) -> tuple[RequestContext, SegmentOptions]:
    """Return the context with priority and timeout of the request, and the options.

    Raises InvalidParameter and RequestValidationError.
    """
    parameters = {name: value for name, value in infer_request.parameters.items() if name != "binary_data_output"}
    priority, timeout_us = parameters.pop("priority", 0), parameters.pop("timeout", 0)
    for name, value in (("priority", priority), ("timeout", timeout_us)):
        if type(value) is not int or value < 0:
            raise InvalidParameter(f"{name} must be an integer, 0 or more, got {value!r}")
    if "task" in parameters or "subtask" in parameters:
        raise InvalidParameter("the task is not a parameter here: request outputs by name")
    try:
        options = SegmentOptions.model_validate(parameters | {"task": list(dict.fromkeys(map(_task_of, outputs)))})
    except ValidationError as error:
        raise invalid_request(error) from error
    deadline = context.deadline
    if timeout_us:
        deadline = min(deadline, asyncio.get_running_loop().time() + timeout_us / 1e6)
    priority = min(priority, LOWEST_PRIORITY) if priority else NORMAL_PRIORITY
    return replace(context, deadline=deadline, priority=priority), options


async def infer_images(
    pipeline: Pipeline,
    images: Sequence[ImageContent],
    outputs: Mapping[OutputName, bool],
    options: SegmentOptions,
    context: RequestContext,
    record: RequestRecord,
    infer_request: InferRequest,
) -> tuple[bytes, int | None]:
    """Return the body of the response and the length of its JSON part; if one image fails, the request fails."""
    contract = pipeline.contract
    encode = partial(_encode, outputs=tuple(outputs))

    async def infer_one(index: int, image: ImageContent) -> dict[OutputName, Any]:
        try:
            return await pipeline.run(image, options, encode, context, record, contract)
        except InputError as error:
            raise type(error)(f"image {index}: {error}") from error

    tasks = [asyncio.create_task(infer_one(*each)) for each in enumerate(images)]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    if not infer_request.outputs and len({result["panoptic_ids"].shape for result in results}) > 1:
        outputs = {name: outputs[name] for name in outputs if name != "panoptic_ids"}
    values = [_stack_outputs([result[name] for result in results]) for name in outputs]
    head: dict[str, Any] = {"model_name": contract.name, "model_version": contract.version}
    if infer_request.id is not None:
        head["id"] = infer_request.id
    return await asyncio.to_thread(encode_infer_response, head, outputs, values)


def _version_statistics(pipeline: Pipeline) -> dict[str, Any]:
    """Return Triton's statistics of a version; times in nanoseconds."""
    stats, (name, version) = pipeline.stats, pipeline.stats.labels

    def describe(*kinds: str) -> dict[str, int]:
        """Return the total time of consecutive stages, and the count of the last."""
        return {"count": stats.counts[kinds[-1]], "ns": round(sum(stats.seconds[kind] for kind in kinds) * 1e9)}

    return {
        "name": name,
        "version": version,
        "last_inference": round(stats.last_inference_s * 1000),
        "inference_count": stats.counts["infer"],
        "execution_count": pipeline.scheduler.runs,
        "inference_stats": {
            "success": describe("success"),
            "fail": describe("fail"),
            **{name: describe(*stages) for name, stages in _STAGES.items()},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }


def _task_of(output: OutputName) -> Task:
    return "panoptic" if output == "panoptic_ids" else output


def _encode(result: SegmentationResult, *, outputs: Sequence[OutputName]) -> dict[OutputName, Any]:
    segmentations = dict(result.segmentations)
    encoded: dict[OutputName, Any] = {}
    for name in outputs:
        task = _task_of(name)
        if name == IDS_OUTPUT:
            encoded[name] = segmentations[task].label_map
        else:
            single = replace(result, segmentations=((task, segmentations[task]),))
            encoded[name] = orjson.dumps(result_to_json(single))
    return encoded


def _stack_outputs(values: list[Any]) -> Output:
    if isinstance(values[0], bytes):
        return values
    if len({value.shape for value in values}) > 1:
        raise InvalidParameter(f"{IDS_OUTPUT!r} needs images of one size: send them one by one")
    return np.stack(values)


def _get_router(request: Request, name: str) -> TrafficRouter:
    return get_state(request).model_repository.routers.get(name)
