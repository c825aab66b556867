"""A request of the Open Inference Protocol, from its bytes to those of its answer."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.datastructures import QueryParams
from starlette.requests import Request

from model.contract import Contract, Task
from model.errors import DeadlinePassed, InputError, OptionInvalid
from service.answers.answers import Found, describe_answer
from service.artifact.pipeline import Pipeline
from service.engine.queue import LEAST_URGENT, NORMAL, Claim
from service.oip.tensors import (
    IDS,
    LENGTH_HEADER,
    InferRequest,
    Output,
    WantedOutput,
    make_response,
    parse_request,
)
from service.parts import get_parts
from service.requests.body import stream_body
from service.requests.options import Options, read_options
from service.telemetry.stopwatch import Stopwatch


async def read_request(request: Request, deadline: float) -> InferRequest:
    """The request in a body. Raises as `parse_request` and `stream_body`, and DeadlinePassed."""
    settings = get_parts(request).settings
    try:
        async with asyncio.timeout_at(deadline):
            body = b"".join([chunk async for chunk in stream_body(request, settings.limit_bytes, settings.stall_s)])
    except TimeoutError as error:
        raise DeadlinePassed("the body did not arrive within the time limit: send fewer at once") from error
    return await asyncio.to_thread(parse_request, body, request.headers.get(LENGTH_HEADER))


def read_parameters(wanted: InferRequest, claim: Claim) -> tuple[Claim, Options]:
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


async def find_all(
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
