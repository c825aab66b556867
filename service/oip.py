"""The Open Inference Protocol v2 under /v2: the same artifact for clients of Triton, KServe and their like."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from model.contract import Contract, Task
from model.errors import DeadlinePassed, InputError, NotReady, OptionInvalid
from service.answers import Found, describe_answer
from service.body import stream_body
from service.boundary import SEGMENT_ROUTE
from service.claims import read_claim
from service.connection import finish_for_client
from service.errors import OIP_PREFIX
from service.oip_reference import (
    INFER_ANSWERS,
    INFER_BODY,
    INFER_ERRORS,
    MODEL_ERRORS,
    NOT_READY,
    describe_errors,
)
from service.oip_statistics import describe_statistics
from service.oip_tensors import (
    IDS,
    INPUT,
    LENGTH_HEADER,
    OUTPUTS,
    InferRequest,
    Output,
    WantedOutput,
    make_response,
    parse_request,
)
from service.options import Options, read_options
from service.parts import get_parts
from service.pipeline import Pipeline
from service.queue import LEAST_URGENT, NORMAL, Claim
from service.telemetry import Stopwatch

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_MODEL, _VERSION = "/models/{name}", "/models/{name}/versions/{version}"
_INFER_ROUTES = (f"{OIP_PREFIX}{_MODEL}/infer", f"{OIP_PREFIX}{_VERSION}/infer")
_STATS_ROUTES = (SEGMENT_ROUTE, *_INFER_ROUTES)
_FIXED = "this service holds the one artifact it was started with: nothing is loaded or unloaded on request"

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
    """How often and how long the model worked, in the terms of the statistics extension."""
    contract = _require(request).contract
    return JSONResponse(describe_statistics(contract, get_parts(request).telemetry, _STATS_ROUTES))


async def describe_model(request: Request) -> Response:
    """Inputs and outputs of the model; -1 is any length."""
    contract = _require(request).contract
    outputs = [{"name": each, "datatype": kind, "shape": shape} for each, (kind, shape) in OUTPUTS.items()]
    return JSONResponse(
        {
            "name": contract.name,
            "versions": [contract.version],
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
    if not _is_ready(request):
        return JSONResponse({"name": request.path_params["name"], "ready": False}, 503)
    return JSONResponse({"name": _require(request).contract.name, "ready": True})


@router.post("/repository/index", responses=describe_errors(503))
async def index(request: Request) -> Response:
    """The models that there are: none until the artifact is ready."""
    if not _is_ready(request):
        return JSONResponse([])
    contract = get_parts(request).deployment.require().contract
    return JSONResponse([{"name": contract.name, "version": contract.version, "state": "READY", "reason": ""}])


async def refuse_change(request: Request) -> Response:
    """Refused: an artifact is given at the start."""
    _require(request)
    raise OptionInvalid(_FIXED)


async def infer(request: Request) -> Response:
    """The segments of the pictures in the tensor `image`, each an encoded file: raw in binary, base64 in JSON.

    Outputs `panoptic` (the default), `instance` and `semantic` hold for each picture the JSON of /v1/segment;
    `panoptic_ids`, in binary alone and for pictures of one size, holds the ids of their pixels. Parameters are those of
    /v1/segment without `task`, and of the extension schedule_policy `priority` and `timeout` in microseconds.
    """
    parts = get_parts(request)
    pipeline = _require(request)
    claim = read_claim(request, parts.settings.deadline_s)
    request.state.stopwatch = stopwatch = Stopwatch(parts.telemetry)
    with pipeline.admit(claim):
        with stopwatch.time("read"):
            wanted = await _read(request, claim.deadline)
        claim, options = _read_parameters(wanted, claim)
        work = _infer(pipeline, wanted, options, claim, stopwatch)
        content, length = await finish_for_client(request, work, claim.deadline)
    headers = {"Server-Timing": stopwatch.render()} | ({} if length is None else {LENGTH_HEADER: str(length)})
    return Response(content, 200, headers, "application/json" if length is None else "application/octet-stream")


async def _read(request: Request, deadline: float) -> InferRequest:
    settings = get_parts(request).settings
    try:
        async with asyncio.timeout_at(deadline):
            body = b"".join([chunk async for chunk in stream_body(request, settings.limit_bytes, settings.stall_s)])
    except TimeoutError as error:
        raise DeadlinePassed("the body did not arrive within the time limit: send fewer at once") from error
    return await asyncio.to_thread(parse_request, body, request.headers.get(LENGTH_HEADER))


def _read_parameters(wanted: InferRequest, claim: Claim) -> tuple[Claim, Options]:
    """Who waits how long, and the options; raises OptionInvalid for a parameter that is none."""
    parameters = dict(wanted.parameters)
    priority, timeout_us = parameters.pop("priority", 0), parameters.pop("timeout", 0)
    for name, value in (("priority", priority), ("timeout", timeout_us)):
        if type(value) is not int or value < 0:
            raise OptionInvalid(f"{name} must be a whole number, 0 or more, got {value!r}")
    if "task" in parameters or "subtask" in parameters:
        raise OptionInvalid("no task is taken here: ask for outputs by name")
    if timeout_us:
        deadline = min(claim.deadline, asyncio.get_running_loop().time() + timeout_us / 1e6)
        claim = replace(claim, deadline=deadline)
    options = replace(read_options(QueryParams(), parameters), tasks=_list_tasks(wanted.outputs))
    return replace(claim, priority=min(priority, LEAST_URGENT) if priority else NORMAL), options


def _list_tasks(outputs: tuple[WantedOutput, ...]) -> tuple[Task, ...]:
    names: dict[str, Task] = {
        "panoptic": "panoptic",
        "instance": "instance",
        "semantic": "semantic",
        IDS: "panoptic",
    }
    return tuple(dict.fromkeys(names[each.name] for each in outputs))


async def _infer(
    pipeline: Pipeline, wanted: InferRequest, options: Options, claim: Claim, stopwatch: Stopwatch
) -> tuple[bytes, int | None]:
    """Body and header of the answer; if one picture fails, all do."""
    encode = partial(_encode, outputs=wanted.outputs, contract=pipeline.contract)

    async def infer_one(number: int, picture: bytes) -> dict[str, Any]:
        try:
            return await pipeline.find(picture, options, encode, claim, stopwatch)
        except InputError as error:
            raise type(error)(f"picture {number}: {error}") from error

    tasks = [asyncio.create_task(infer_one(*each)) for each in enumerate(wanted.pictures)]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    outputs = [(each, _gather([result[each.name] for result in results])) for each in wanted.outputs]
    head: dict[str, Any] = {"model_name": pipeline.contract.name, "model_version": pipeline.contract.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    return await asyncio.to_thread(make_response, head, outputs)


def _encode(found: Found, *, outputs: tuple[WantedOutput, ...], contract: Contract) -> dict[str, Any]:
    answers = dict(found.segmentations)
    encoded: dict[str, Any] = {}
    for each in outputs:
        if each.name == IDS:
            encoded[IDS] = answers["panoptic"].label_map
        else:
            (task,) = _list_tasks((each,))
            one = replace(found, segmentations=((task, answers[task]),))
            encoded[each.name] = orjson.dumps(describe_answer(one, contract))
    return encoded


def _gather(results: list[Any]) -> Output:
    if isinstance(results[0], bytes):
        return results
    if len({result.shape for result in results}) > 1:
        raise OptionInvalid(f"{IDS!r} needs pictures of one size: ask for them one by one")
    return np.stack(results)


def _is_ready(request: Request) -> bool:
    try:
        get_parts(request).deployment.require_ready()
    except NotReady:
        return False
    return True


def _require(request: Request) -> Pipeline:
    """The artifact at work, if the path means it. Raises HTTPException 404 if not, NotReady while there is none."""
    pipeline = get_parts(request).deployment.require()
    known = {"name": pipeline.contract.name, "version": pipeline.contract.version}
    for key, value in request.path_params.items():
        if known[key] != value:
            raise HTTPException(404, f"no model of {key} {value!r}: there is {known['name']!r} {known['version']!r}")
    return pipeline


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
