"""The Open Inference Protocol v2 under /v2: the same artifact for clients of Triton, KServe and their like."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from model.errors import NotReady, OptionInvalid
from service.answers.errors import OIP_PREFIX
from service.artifact.pipeline import Pipeline
from service.engine.queue import Claim
from service.oip.inference import find_all, read_parameters, read_request
from service.oip.reference import (
    INFER_ANSWERS,
    INFER_BODY,
    INFER_ERRORS,
    MODEL_ERRORS,
    NOT_READY,
    describe_errors,
)
from service.oip.statistics import describe_statistics
from service.oip.tensors import (
    INPUT,
    LENGTH_HEADER,
    OUTPUTS,
)
from service.parts import get_parts
from service.registry.rollout import Rollout, Route
from service.requests.claims import read_claim, read_routing_key
from service.requests.connection import finish_for_client
from service.telemetry.stopwatch import Stopwatch

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_MODEL, _VERSION = "/models/{name}", "/models/{name}/versions/{version}"
_FIXED = "this service holds the one artifact it was started with: nothing is loaded or unloaded on request"

_LED = "versions come and go as the registry says: POST /v1/models/NAME/active, canary, shadow, promote or rollback"
_OPEN = ("active", "canary", "shadow", "standby", "orphaned")
_STATES = {"opening": "LOADING", **dict.fromkeys(_OPEN, "READY")}
"""What Triton calls what a version is up to."""

router = APIRouter(prefix=OIP_PREFIX, tags=["Open Inference Protocol v2"])


@router.get("")
@router.get("/", include_in_schema=False)
async def describe_server(request: Request) -> Response:
    """Name, version and extensions of the server."""
    return JSONResponse({"name": "useg", "version": request.app.version, "extensions": list(EXTENSIONS)})


@router.get("/health/live")
async def live() -> Response:
    """Whether the process answers at all."""
    return JSONResponse({"live": True})


@router.get("/health/ready", responses=NOT_READY)
async def ready(request: Request) -> Response:
    """Whether pictures are taken; 503 if not."""
    is_ready = _is_ready(request)
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


async def show_statistics(request: Request) -> Response:
    """How often and how long each version worked, in the terms of the statistics extension.

    Of all versions that are open, where the path names none; of all models, where it names no model either.
    """
    return JSONResponse({"model_stats": [describe_statistics(each) for each in _list_pipelines(request)]})


async def describe_model(request: Request) -> Response:
    """Inputs and outputs of the model; -1 is any length."""
    contract = _require(request).contract
    outputs = [{"name": each, "datatype": kind, "shape": shape} for each, (kind, shape) in OUTPUTS.items()]
    return JSONResponse(
        {
            "name": contract.name,
            "versions": _find(request).list_versions(),
            "platform": "onnx_onnxv1",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": outputs,
        }
    )


async def configure_model(request: Request) -> Response:
    """The same in the terms of Triton's model configuration; pictures are batched here, whatever requests hold."""
    contract = _require(request).contract
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
    is_ready = not get_parts(request).fleet.is_draining
    try:
        _require(request)
    except NotReady:
        is_ready = False
    return JSONResponse({"name": request.path_params["name"], "ready": is_ready}, 200 if is_ready else 503)


@router.post("/repository/index", responses=describe_errors(503))
async def index(request: Request) -> Response:
    """The models that there are, with all their versions: none until one is ready."""
    statuses = await asyncio.to_thread(get_parts(request).fleet.leader.list_statuses)
    return JSONResponse(
        [
            {
                "name": model.name,
                "version": each.version,
                "state": _STATES.get(each.state, "UNAVAILABLE"),
                "reason": each.reason or (each.state if each.state in ("idle", "refused") else ""),
            }
            for model in statuses
            for each in model.versions
        ]
    )


async def refuse_change(request: Request) -> Response:
    """Refused: an artifact is given at the start."""
    _require(request)
    has_registry = get_parts(request).fleet.leader.registry is not None
    raise OptionInvalid(_LED if has_registry else _FIXED)


async def infer(request: Request) -> Response:
    """The segments of the pictures in the tensor `image`, each an encoded file: raw in binary, base64 in JSON.

    Outputs `panoptic` (the default), `instance` and `semantic` hold for each picture the JSON of /v1/segment;
    `panoptic_ids`, in binary alone and for pictures of one size, holds the ids of their pixels. Parameters are those of
    /v1/segment without `task`, and of the extension schedule_policy `priority` and `timeout` in microseconds.
    """
    parts = get_parts(request)
    claim = read_claim(request, parts.settings.deadline_s)
    rollout = _find(request)
    request.state.tally = rollout.tally
    version = request.path_params.get("version")
    admitted = rollout.admit(claim, read_routing_key(request)) if version is None else _admit(request, claim)
    request.state.stopwatch = stopwatch = Stopwatch(parts.telemetry)
    with admitted as route:
        with stopwatch.time("read"):
            wanted = await read_request(request, claim.deadline)
        claim, options = read_parameters(wanted, claim)

        async def ask(pipeline: Pipeline, claim: Claim) -> tuple[bytes, int | None]:
            request.state.tally = pipeline.tally
            return await find_all(pipeline, wanted, options, claim, stopwatch)

        content, length = await finish_for_client(request, replace(route, claim=claim).answer(ask), claim.deadline)
    rollout.mirror(wanted.pictures)
    headers = {"Server-Timing": stopwatch.render()} | ({} if length is None else {LENGTH_HEADER: str(length)})
    return Response(content, 200, headers, "application/json" if length is None else "application/octet-stream")


def _is_ready(request: Request) -> bool:
    fleet = get_parts(request).fleet
    try:
        fleet.require_ready()
    except NotReady:
        return False
    return True


def _find(request: Request) -> Rollout:
    """The model that the path means. Raises ModelNotFound, and NotReady while there is none."""
    return get_parts(request).fleet.find(request.path_params.get("name"))


def _require(request: Request) -> Pipeline:
    """The version that the path means, the active one where it says none. Raises ModelNotFound and NotReady."""
    rollout, version = _find(request), request.path_params.get("version")
    active = rollout.require()
    return active if version is None else rollout.find_version(version)


def _list_pipelines(request: Request) -> list[Pipeline]:
    """Those that the path means. Raises as `_require`."""
    if "version" in request.path_params:
        return [_require(request)]
    every = get_parts(request).fleet.list_rollouts().values()
    rollouts = [_find(request)] if "name" in request.path_params else every
    return [each for rollout in rollouts for each in rollout.list_pipelines()]


@contextmanager
def _admit(request: Request, claim: Claim) -> Iterator[Route]:
    """A place with the version that the path means, and with no other."""
    pipeline = _require(request)
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
        responses = INFER_ANSWERS | INFER_ERRORS
    else:
        responses = MODEL_ERRORS | (describe_errors(422) if method == "POST" else {})
    router.add_api_route(path, handler, methods=[method], openapi_extra=extra, responses=responses)


def _add_model_routes() -> None:
    """The routes of a model, each with and without its version."""
    _add_route("/models/stats", show_statistics, "GET")
    for end, handler, method in (
        ("", describe_model, "GET"),
        ("/config", configure_model, "GET"),
        ("/ready", model_ready, "GET"),
        ("/stats", show_statistics, "GET"),
        ("/infer", infer, "POST"),
    ):
        _add_route(_MODEL + end, handler, method)
        _add_route(_VERSION + end, handler, method)
    for verb in ("load", "unload"):
        _add_route(f"/repository{_MODEL}/{verb}", refuse_change, "POST")


_add_model_routes()
