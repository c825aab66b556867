"""What is served, for those who look and for those who may change it."""

import asyncio
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request

from model.errors import ArtifactError, RegistryConflict
from model.registry.registry import Registry
from model.registry.state import State
from service.api.administrators import require_administrator
from service.api.json_body import describe_body, parse_body, read_small_body
from service.api.reference import describe_problems
from service.parts import get_parts
from service.registry.fleet import Leader
from service.registry.schemas import Activation, ModelHistory, ModelList, Step, TrialRun

_CHANGING = describe_problems(403, 404, 409, 413, 415, 422, 500, 503, 504)
_FIXED = "this service holds the one artifact it was started with: start it with --registry to change versions"

_STEP = describe_body(Step.model_json_schema(), is_required=False)

Change = Callable[[Registry], State]
router = APIRouter(tags=["Models"])


@router.get("/v1/models", responses=describe_problems(500))
async def list_models(request: Request) -> ModelList:
    """All models, and what their versions are up to."""
    statuses = await asyncio.to_thread(get_parts(request).fleet.leader.list_statuses)
    return ModelList(models=[each.summarise() for each in statuses])


@router.get("/v1/models/{name}", responses=describe_problems(404, 422, 500, 503))
async def show_model(name: str, request: Request) -> ModelHistory:
    """One model: its versions, what they are up to, and how that came about."""
    fleet = get_parts(request).fleet
    fleet.find(name)
    return await _read_status(fleet.leader, name)


@router.post(
    "/v1/models/{name}/active", responses=_CHANGING, openapi_extra=describe_body(Activation.model_json_schema())
)
async def activate(name: str, request: Request) -> ModelHistory:
    """Have a version answer, once it is checked and warm; until then, the one before does. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), Activation)
    return await _change(request, name, lambda each: each.activate(name, given.version, by=by, reason=given.reason))


@router.post("/v1/models/{name}/canary", responses=_CHANGING, openapi_extra=describe_body(TrialRun.model_json_schema()))
async def try_canary(name: str, request: Request) -> ModelHistory:
    """Have a version answer a share of the callers, always the same ones. For administrators."""
    return await _try_out(request, name, "canary")


@router.post("/v1/models/{name}/shadow", responses=_CHANGING, openapi_extra=describe_body(TrialRun.model_json_schema()))
async def try_shadow(name: str, request: Request) -> ModelHistory:
    """Run a version on a share of the pictures, too, without anybody seeing its answers. For administrators."""
    return await _try_out(request, name, "shadow")


@router.post("/v1/models/{name}/promote", responses=_CHANGING, openapi_extra=_STEP)
async def promote(name: str, request: Request) -> ModelHistory:
    """Have the canary answer everybody. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request) or b"{}", Step)
    return await _change(request, name, lambda each: each.promote(name, by=by, reason=given.reason))


@router.post("/v1/models/{name}/rollback", responses=_CHANGING, openapi_extra=_STEP)
async def roll_back(name: str, request: Request) -> ModelHistory:
    """End a trial, or have the version before the active one answer again, at once while it is warm.

    For administrators.
    """
    by = require_administrator(request)
    given = parse_body(await read_small_body(request) or b"{}", Step)
    return await _change(request, name, lambda each: each.roll_back(name, by=by, reason=given.reason))


async def _try_out(request: Request, name: str, role: Literal["canary", "shadow"]) -> ModelHistory:
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), TrialRun)
    return await _change(
        request, name, lambda each: each.try_out(name, role, given.version, given.share, by=by, reason=given.reason)
    )


async def _change(request: Request, name: str, change: Change) -> ModelHistory:
    """The model after a change of the registry, which is also looked at at once."""
    leader = get_parts(request).fleet.leader
    if leader.registry is None:
        raise RegistryConflict(_FIXED)
    try:
        await asyncio.to_thread(change, leader.registry)
    except ArtifactError as error:
        raise RegistryConflict(f"that version cannot be served: {error}") from error
    await leader.look()
    return await _read_status(leader, name)


async def _read_status(leader: Leader, name: str) -> ModelHistory:
    """One model's; files are read for it, so off the event loop."""
    statuses = await asyncio.to_thread(leader.list_statuses)
    return next(each for each in statuses if each.name == name)
