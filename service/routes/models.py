"""What is served, for those who look and for those who may change it."""

import asyncio
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request

from model.errors import ArtifactError, RegistryConflict
from model.registry.deployment import DeploymentState
from model.registry.versions import Registry
from service.rollout.model_repository import VersionSource
from service.rollout.model_status import ActivationRequest, ModelHistory, ModelList, ReasonBody, TrafficSplitRequest
from service.routes.administrators import require_administrator
from service.routes.json_body import describe_body, parse_body, read_small_body
from service.routes.openapi import document_problems
from service.state import get_state

_CHANGING = document_problems(403, 404, 409, 413, 415, 422, 500, 503, 504)
_NO_REGISTRY = "this service holds the one artifact it was started with: start it with --registry to change versions"

_REASON_BODY = describe_body(ReasonBody.model_json_schema(), is_required=False)

Change = Callable[[Registry], DeploymentState]
router = APIRouter(tags=["Models"])


@router.get("/v1/models", responses=document_problems(500))
async def list_models(request: Request) -> ModelList:
    """All models, and what their versions are up to."""
    statuses = await asyncio.to_thread(get_state(request).model_repository.leader.list_statuses)
    return ModelList(models=[each.summarise() for each in statuses])


@router.get("/v1/models/{name}", responses=document_problems(404, 422, 500, 503))
async def show_model(name: str, request: Request) -> ModelHistory:
    """One model: its versions, what they are up to, and how that came about."""
    fleet = get_state(request).model_repository
    fleet.find(name)
    return await _get_status(fleet.leader, name)


@router.post(
    "/v1/models/{name}/active", responses=_CHANGING, openapi_extra=describe_body(ActivationRequest.model_json_schema())
)
async def activate(name: str, request: Request) -> ModelHistory:
    """Have a version answer, once it is checked and warm; until then, the one before does. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), ActivationRequest)
    return await _change(request, name, lambda each: each.activate(name, given.version, author=by, reason=given.reason))


@router.post(
    "/v1/models/{name}/canary",
    responses=_CHANGING,
    openapi_extra=describe_body(TrafficSplitRequest.model_json_schema()),
)
async def start_canary(name: str, request: Request) -> ModelHistory:
    """Have a version answer a share of the callers, always the same ones. For administrators."""
    return await _split_traffic(request, name, "canary")


@router.post(
    "/v1/models/{name}/shadow",
    responses=_CHANGING,
    openapi_extra=describe_body(TrafficSplitRequest.model_json_schema()),
)
async def start_shadow(name: str, request: Request) -> ModelHistory:
    """Run a version on a share of the pictures, too, without anybody seeing its answers. For administrators."""
    return await _split_traffic(request, name, "shadow")


@router.post("/v1/models/{name}/promote", responses=_CHANGING, openapi_extra=_REASON_BODY)
async def promote(name: str, request: Request) -> ModelHistory:
    """Have the canary answer everybody. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request) or b"{}", ReasonBody)
    return await _change(request, name, lambda each: each.promote(name, author=by, reason=given.reason))


@router.post("/v1/models/{name}/rollback", responses=_CHANGING, openapi_extra=_REASON_BODY)
async def roll_back(name: str, request: Request) -> ModelHistory:
    """End a trial, or have the version before the active one answer again, at once while it is warm.

    For administrators.
    """
    by = require_administrator(request)
    given = parse_body(await read_small_body(request) or b"{}", ReasonBody)
    return await _change(request, name, lambda each: each.roll_back(name, author=by, reason=given.reason))


async def _split_traffic(request: Request, name: str, role: Literal["canary", "shadow"]) -> ModelHistory:
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), TrafficSplitRequest)
    return await _change(
        request,
        name,
        lambda each: each.deploy_as(name, role, given.version, given.share, author=by, reason=given.reason),
    )


async def _change(request: Request, name: str, change: Change) -> ModelHistory:
    """The model after a change of the registry, which is also looked at at once."""
    leader = get_state(request).model_repository.leader
    if leader.registry is None:
        raise RegistryConflict(_NO_REGISTRY)
    try:
        await asyncio.to_thread(change, leader.registry)
    except ArtifactError as error:
        raise RegistryConflict(f"that version cannot be served: {error}") from error
    await leader.look()
    return await _get_status(leader, name)


async def _get_status(leader: VersionSource, name: str) -> ModelHistory:
    """One model's; files are read for it, so off the event loop."""
    statuses = await asyncio.to_thread(leader.list_statuses)
    return next(each for each in statuses if each.name == name)
