"""Inference and statistics of the Open Inference Protocol v2."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError
from starlette.requests import Request

from model.contract import Contract, Task
from model.errors import InputError, InvalidParameter
from service.inference.pipeline import ImageContent, Pipeline, SegmentationResult
from service.oip.schemas import IDS_OUTPUT, InferRequest, OutputName
from service.oip.tensors import LENGTH_HEADER, Output, encode_infer_response, parse_infer_request
from service.requests import (
    LOWEST_PRIORITY,
    NORMAL_PRIORITY,
    RequestContext,
    SegmentOptions,
    invalid_request,
    read_in_time,
)
from service.responses.encoders import result_to_json
from service.telemetry.metrics import Stage
from service.telemetry.recorders import DurationSum, StageTimer

_STAGES: dict[str, Sequence[Stage]] = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("merge", "encode"),
}
"""Our stages for each of the protocol's, in their order."""


async def read_infer_request(request: Request, deadline: float) -> tuple[InferRequest, tuple[ImageContent, ...]]:
    """Read a request and its images. Raises as `parse_infer_request` and `read_in_time`."""
    body = await read_in_time(request.body(), deadline)
    return await asyncio.to_thread(parse_infer_request, body, request.headers.get(LENGTH_HEADER))


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
    timer: StageTimer,
    infer_request: InferRequest,
) -> tuple[bytes, int | None]:
    """Return the body of the response and the length of its JSON part; if one image fails, the request fails."""
    contract = pipeline.contract
    encode = partial(_encode, outputs=tuple(outputs), contract=contract)

    async def infer_one(index: int, image: ImageContent) -> dict[OutputName, Any]:
        try:
            return await pipeline.run(image, options, encode, context, timer, contract)
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
    head: dict[str, Any] = {"model_name": pipeline.contract.name, "model_version": pipeline.contract.version}
    if infer_request.id is not None:
        head["id"] = infer_request.id
    return await asyncio.to_thread(encode_infer_response, head, outputs, values)


def version_statistics(pipeline: Pipeline) -> dict[str, Any]:
    """Return the statistics of a version since it was loaded; times in nanoseconds."""
    stats = pipeline.stats
    return {
        "name": stats.model,
        "version": stats.version,
        "last_inference": round(stats.last_inference_s * 1000),
        "inference_count": stats.stages["infer"].count,
        "execution_count": pipeline.scheduler.runs,
        "inference_stats": {
            "success": _duration(stats.succeeded),
            "fail": _duration(stats.failed),
            **{name: _duration(*(stats.stages[each] for each in stages)) for name, stages in _STAGES.items()},
            "cache_hit": _duration(DurationSum()),
            "cache_miss": _duration(DurationSum()),
        },
        "batch_stats": [],
    }


def _task_of(output: OutputName) -> Task:
    return "panoptic" if output == "panoptic_ids" else output


def _encode(result: SegmentationResult, *, outputs: Sequence[OutputName], contract: Contract) -> dict[OutputName, Any]:
    segmentations = dict(result.segmentations)
    encoded: dict[OutputName, Any] = {}
    for name in outputs:
        task = _task_of(name)
        if name == IDS_OUTPUT:
            encoded[name] = segmentations[task].label_map
        else:
            single = replace(result, segmentations=((task, segmentations[task]),))
            encoded[name] = orjson.dumps(result_to_json(single, contract))
    return encoded


def _stack_outputs(values: list[Any]) -> Output:
    if isinstance(values[0], bytes):
        return values
    if len({value.shape for value in values}) > 1:
        raise InvalidParameter(f"{IDS_OUTPUT!r} needs images of one size: send them one by one")
    return np.stack(values)


def _duration(*sums: DurationSum) -> dict[str, int]:
    """Return the total time of consecutive stages, and the count of the last."""
    return {"count": sums[-1].count, "ns": round(sum(each.seconds for each in sums) * 1e9)}
