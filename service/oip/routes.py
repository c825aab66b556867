"""The Open Inference Protocol v2 under /v2: the same artifact for clients of Triton, KServe and their like."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from model.errors import InvalidParameter, NotReady
from service.inference.pipeline import Pipeline
from service.oip.inference import infer_images, parse_infer_parameters, read_infer_request, version_statistics
from service.oip.schemas import INFER_BODY, INFER_ERRORS, INFER_RESPONSES, MODEL_ERRORS, NOT_READY, document_errors
from service.oip.tensors import INPUT, LENGTH_HEADER, OUTPUTS
from service.requests.context import RequestContext, cancel_on_disconnect, get_routing_key, parse_request_context
from service.responses.problems import OIP_PREFIX
from service.rollout.router import Route, TrafficRouter
from service.state import get_state
from service.telemetry.stage_timer import StageTimer

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_MODEL, _VERSION = "/models/{name}", "/models/{name}/versions/{version}"
_FIXED = "this service holds the one artifact it was started with: nothing is loaded or unloaded on request"

_LED = "versions come and go as the registry says: POST /v1/models/NAME/active, canary, shadow, promote or rollback"
_OPEN = ("active", "canary", "shadow", "standby", "missing_from_registry")
_STATES = {"loading": "LOADING", **dict.fromkeys(_OPEN, "READY")}
"""What Triton calls what a version is up to."""

router = APIRouter(prefix=OIP_PREFIX, tags=["Open Inference Protocol v2"])


@router.get("")
@router.get("/", include_in_schema=False)
async def server_metadata(request: Request) -> Response:
    """Name, version and extensions of the server."""
    return JSONResponse({"name": "useg", "version": request.app.version, "extensions": list(EXTENSIONS)})


@router.get("/health/live")
async def health_live() -> Response:
    """Whether the process answers at all."""
    return JSONResponse({"live": True})


@router.get("/health/ready", responses=NOT_READY)
async def health_ready(request: Request) -> Response:
    """Whether pictures are taken; 503 if not."""
    is_ready = _is_ready(request)
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


async def model_statistics(request: Request) -> Response:
    """How often and how long each version worked, in the terms of the statistics extension.

    Of all versions that are open, where the path names none; of all models, where it names no model either.
    """
    return JSONResponse({"model_stats": [version_statistics(each) for each in _list_pipelines(request)]})


async def model_metadata(request: Request) -> Response:
    """Inputs and outputs of the model; -1 is any length."""
    contract = _get_pipeline(request).contract
    outputs = [{"name": each, "datatype": kind, "shape": shape} for each, (kind, shape) in OUTPUTS.items()]
    return JSONResponse(
        {
            "name": contract.name,
            "versions": _get_router(request).list_versions(),
            "platform": "onnx_onnxv1",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": outputs,
        }
    )


async def model_config(request: Request) -> Response:
    """The same in the terms of Triton's model configuration; pictures are batched here, whatever requests hold."""
    contract = _get_pipeline(request).contract
    types = {"BYTES": "TYPE_STRING", "INT32": "TYPE_INT32"}
    outputs = [{"name": each, "data_type": types[kind], "dims": shape} for each, (kind, shape) in OUTPUTS.items()]
    inputs = [{"name": INPUT, "data_type": "TYPE_STRING", "dims": [-1]}]
    return JSONResponse(
        {
            "name": contract.name,
            "platform": "onnxruntime_onnx",
            "backend": "useg",
            "max_batch_size": 0,
            "input": inputs,
            "output": outputs,
        }
    )


async def model_ready(request: Request) -> Response:
    """Whether the model takes pictures; 503 if not."""
    is_ready = not get_state(request).model_repository.is_draining
    try:
        _get_pipeline(request)
    except NotReady:
        is_ready = False
    return JSONResponse({"name": request.path_params["name"], "ready": is_ready}, 200 if is_ready else 503)


@router.post("/repository/index", responses=document_errors(503))
async def repository_index(request: Request) -> Response:
    """The models that there are, with all their versions: none until one is ready."""
    statuses = await asyncio.to_thread(get_state(request).model_repository.leader.list_statuses)
    return JSONResponse(
        [
            {
                "name": model.name,
                "version": each.version,
                "state": _STATES.get(each.state, "UNAVAILABLE"),
                "reason": each.reason or (each.state if each.state in ("unloaded", "failed") else ""),
            }
            for model in statuses
            for each in model.versions
        ]
    )


async def reject_repository_change(request: Request) -> Response:
    """Refused: an artifact is given at the start."""
    _get_pipeline(request)
    has_registry = get_state(request).model_repository.leader.registry is not None
    raise InvalidParameter(_LED if has_registry else _FIXED)


async def infer(request: Request) -> Response:
    """The segments of the pictures in the tensor `image`, each an encoded file: raw in binary, base64 in JSON.

    Outputs `panoptic` (the default), `instance` and `semantic` hold for each picture the JSON of /v1/segment;
    `panoptic_ids`, in binary alone and for pictures of one size, holds the ids of their pixels. Parameters are those of
    /v1/segment without `task`, and of the extension schedule_policy `priority` and `timeout` in microseconds.
    """
    parts = get_state(request)
    claim = parse_request_context(request, parts.settings.request_timeout_s)
    rollout = _get_router(request)
    request.state.tally = rollout.tally
    version = request.path_params.get("version")
    admitted = rollout.admit(claim, get_routing_key(request)) if version is None else _admit(request, claim)
    request.state.stopwatch = stopwatch = StageTimer(parts.telemetry)
    with admitted as route:
        with stopwatch.time("read"):
            wanted = await read_infer_request(request, claim.deadline)
        claim, options = parse_infer_parameters(wanted, claim)

        async def ask(pipeline: Pipeline, claim: RequestContext) -> tuple[bytes, int | None]:
            request.state.tally = pipeline.tally
            return await infer_images(pipeline, wanted, options, claim, stopwatch)

        content, length = await cancel_on_disconnect(request, replace(route, claim=claim).answer(ask), claim.deadline)
    rollout.mirror(wanted.pictures)
    headers = {"Server-Timing": stopwatch.render()} | ({} if length is None else {LENGTH_HEADER: str(length)})
    return Response(content, 200, headers, "application/json" if length is None else "application/octet-stream")


def _is_ready(request: Request) -> bool:
    fleet = get_state(request).model_repository
    try:
        fleet.require_ready()
    except NotReady:
        return False
    return True


def _get_router(request: Request) -> TrafficRouter:
    """The model that the path means. Raises ModelNotFound, and NotReady while there is none."""
    return get_state(request).model_repository.find(request.path_params.get("name"))


def _get_pipeline(request: Request) -> Pipeline:
    """The version that the path means, the active one where it says none. Raises ModelNotFound and NotReady."""
    rollout, version = _get_router(request), request.path_params.get("version")
    active = rollout.require()
    return active if version is None else rollout.find_version(version)


def _list_pipelines(request: Request) -> list[Pipeline]:
    """Those that the path means. Raises as `_get_pipeline`."""
    if "version" in request.path_params:
        return [_get_pipeline(request)]
    every = get_state(request).model_repository.list_routers().values()
    rollouts = [_get_router(request)] if "name" in request.path_params else every
    return [each for rollout in rollouts for each in rollout.list_pipelines()]


@contextmanager
def _admit(request: Request, claim: RequestContext) -> Iterator[Route]:
    """A place with the version that the path means, and with no other."""
    pipeline = _get_pipeline(request)
    with pipeline.admit(claim):
        yield Route(pipeline=pipeline, spare=None, claim=claim)


def _add_route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str) -> None:
    parameters = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in (("name", "The model's name."), ("version", "Its version."))
        if f"{{{name}}}" in path
    ]
    extra: dict[str, Any] = {"parameters": parameters}
    if handler is infer:
        extra |= {"requestBody": INFER_BODY}
    if handler is infer:
        responses = INFER_RESPONSES | INFER_ERRORS
    else:
        responses = MODEL_ERRORS | (document_errors(422) if method == "POST" else {})
    router.add_api_route(path, handler, methods=[method], openapi_extra=extra, responses=responses)


def _add_model_routes() -> None:
    """The routes of a model, each with and without its version."""
    _add_route("/models/stats", model_statistics, "GET")
    for end, handler, method in (
        ("", model_metadata, "GET"),
        ("/config", model_config, "GET"),
        ("/ready", model_ready, "GET"),
        ("/stats", model_statistics, "GET"),
        ("/infer", infer, "POST"),
    ):
        _add_route(_MODEL + end, handler, method)
        _add_route(_VERSION + end, handler, method)
    for verb in ("load", "unload"):
        _add_route(f"/repository{_MODEL}/{verb}", reject_repository_change, "POST")


_add_model_routes()
