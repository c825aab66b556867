"""A request of the Open Inference Protocol, from its bytes to those of its answer."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.datastructures import QueryParams
from starlette.requests import Request

from model.contract import Contract, Task
from model.errors import DeadlineExceeded, InputError, InvalidParameter
from service.inference.pipeline import Pipeline
from service.oip.tensors import (
    IDS,
    LENGTH_HEADER,
    InferRequest,
    Output,
    RequestedOutput,
    encode_infer_response,
    parse_infer_request,
)
from service.requests.body import stream_body
from service.requests.context import LOWEST_PRIORITY, NORMAL_PRIORITY, RequestContext
from service.requests.parameters import SegmentParameters, parse_parameters
from service.responses.encoders import SegmentationResult, result_to_json
from service.state import get_state
from service.telemetry.metrics import Stage
from service.telemetry.stage_timer import StageTimer
from service.telemetry.version_stats import DurationSum


async def read_infer_request(request: Request, deadline: float) -> InferRequest:
    """The request in a body. Raises as `parse_infer_request` and `stream_body`, and DeadlineExceeded."""
    settings = get_state(request).settings
    try:
        async with asyncio.timeout_at(deadline):
            body = b"".join(
                [chunk async for chunk in stream_body(request, settings.max_body_bytes, settings.client_timeout_s)]
            )
    except TimeoutError as error:
        raise DeadlineExceeded("the body did not arrive within the time limit: send fewer at once") from error
    return await asyncio.to_thread(parse_infer_request, body, request.headers.get(LENGTH_HEADER))


def parse_infer_parameters(wanted: InferRequest, claim: RequestContext) -> tuple[RequestContext, SegmentParameters]:
    """Who waits how long, and the options; raises InvalidParameter for a parameter that is none."""
    parameters = dict(wanted.parameters)
    priority, timeout_us = parameters.pop("priority", 0), parameters.pop("timeout", 0)
    for name, value in (("priority", priority), ("timeout", timeout_us)):
        if type(value) is not int or value < 0:
            raise InvalidParameter(f"{name} must be a whole number, 0 or more, got {value!r}")
    if "task" in parameters or "subtask" in parameters:
        raise InvalidParameter("no task is taken here: ask for outputs by name")
    if timeout_us:
        deadline = min(claim.deadline, asyncio.get_running_loop().time() + timeout_us / 1e6)
        claim = replace(claim, deadline=deadline)
    options = replace(parse_parameters(QueryParams(), parameters), tasks=_list_tasks(wanted.outputs))
    return replace(claim, priority=min(priority, LOWEST_PRIORITY) if priority else NORMAL_PRIORITY), options


def _list_tasks(outputs: tuple[RequestedOutput, ...]) -> tuple[Task, ...]:
    names: dict[str, Task] = {
        "panoptic": "panoptic",
        "instance": "instance",
        "semantic": "semantic",
        IDS: "panoptic",
    }
    return tuple(dict.fromkeys(names[each.name] for each in outputs))


async def infer_images(
    pipeline: Pipeline, wanted: InferRequest, options: SegmentParameters, claim: RequestContext, stopwatch: StageTimer
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
    outputs = [(each, _stack_outputs([result[each.name] for result in results])) for each in wanted.outputs]
    head: dict[str, Any] = {"model_name": pipeline.contract.name, "model_version": pipeline.contract.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    return await asyncio.to_thread(encode_infer_response, head, outputs)


def _encode(found: SegmentationResult, *, outputs: tuple[RequestedOutput, ...], contract: Contract) -> dict[str, Any]:
    answers = dict(found.segmentations)
    encoded: dict[str, Any] = {}
    for each in outputs:
        if each.name == IDS:
            encoded[IDS] = answers["panoptic"].label_map
        else:
            (task,) = _list_tasks((each,))
            one = replace(found, segmentations=((task, answers[task]),))
            encoded[each.name] = orjson.dumps(result_to_json(one, contract))
    return encoded


def _stack_outputs(results: list[Any]) -> Output:
    if isinstance(results[0], bytes):
        return results
    if len({result.shape for result in results}) > 1:
        raise InvalidParameter(f"{IDS!r} needs pictures of one size: ask for them one by one")
    return np.stack(results)


_NANOSECONDS = 1e9
_STAGES: dict[str, Sequence[Stage]] = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("merge", "encode"),
}
"""Ours for each of the protocol's; they follow each other."""


def version_statistics(pipeline: Pipeline) -> dict[str, Any]:
    """What a version has done; times in nanoseconds."""
    tally = pipeline.tally
    return {
        "name": tally.model,
        "version": tally.version,
        "last_inference": round(tally.last_answer_s * 1000),
        "inference_count": tally.stages["infer"].count,
        "execution_count": pipeline.engine.runs,
        "inference_stats": {
            "success": _duration(tally.answered),
            "fail": _duration(tally.failed),
            **{name: _duration(*(tally.stages[each] for each in stages)) for name, stages in _STAGES.items()},
            "cache_hit": _duration(DurationSum()),
            "cache_miss": _duration(DurationSum()),
        },
        "batch_stats": [],
    }


def _duration(*parts: DurationSum) -> dict[str, int]:
    """Times of parts that follow each other, and how often the last of them took place."""
    return {"count": parts[-1].count, "ns": round(sum(part.seconds for part in parts) * _NANOSECONDS)}
