"""Health, metrics, and `/v1/models`: models, their versions, and changes of what is served."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from model.errors import ArtifactError, RegistryConflict, RegistryError
from model.registry.versions import DeploymentState, Registry
from service.middleware import API_KEY, Admin, get_state
from service.problems import document_problems
from service.rollout.model_repository import ModelRepository
from service.schemas import Liveness, ModelHistory, ModelInfo, ModelList, Readiness, Schema

_CHANGE = document_problems(403, 404, 408, 409, 413, 415, 422, 429, 500, 503)
_NO_REGISTRY = "this server serves a single artifact: start it with --registry to change versions"

Change = Callable[[Registry], DeploymentState]
health_router = APIRouter(tags=["Health"], responses=document_problems(431))
router = APIRouter(tags=["Models"], dependencies=API_KEY, responses=document_problems(401, 431))


class ReasonBody(Schema, defer_build=False):
    """The reason for a change."""

    reason: Annotated[str, Field(max_length=500)] = ""
    """A note for the history."""


class ActivationRequest(ReasonBody):
    """The version to activate."""

    version: str


class TrafficSplitRequest(ReasonBody):
    """The version to try."""

    version: str
    traffic_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Fraction of the clients for a canary, of the images for a shadow."""


@health_router.get("/livez")
async def live() -> Liveness:
    """Report that the process responds."""
    return Liveness(status="alive")


@health_router.get("/readyz", responses=document_problems(503))
async def ready(request: Request) -> Readiness:
    """Report whether images are accepted: the model passed its checks and is warmed up."""
    contract = get_state(request).model_repository.get_ready_pipeline().contract
    return Readiness(status="ready", model=ModelInfo(name=contract.name, version=contract.version))


@health_router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Return all metrics in the Prometheus text format."""
    state = get_state(request)
    state.model_repository.update_metrics()
    return Response(state.telemetry.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/v1/models", responses=document_problems(500))
async def list_models(request: Request) -> ModelList:
    """List all models and the states of their versions."""
    return ModelList(models=list(await asyncio.to_thread(get_state(request).model_repository.list_statuses)))


@router.get("/v1/models/{name}", responses=document_problems(404, 422, 500, 503))
async def show_model(name: str, request: Request) -> ModelHistory:
    """Return one model: its versions, their states, and the history of changes."""
    repository = get_state(request).model_repository
    repository.routers.get(name)
    return await _get_status(repository, name)


@router.post("/v1/models/{name}/active", responses=_CHANGE)
async def activate(name: str, body: ActivationRequest, request: Request, author: Admin) -> ModelHistory:
    """Serve a version once it has passed its checks and is warmed up; until then the previous one serves.

    Requires an admin key.
    """
    return await _change(
        request, name, lambda each: each.activate(name, body.version, author=author, reason=body.reason)
    )


@router.post("/v1/models/{name}/canary", responses=_CHANGE)
async def start_canary(name: str, body: TrafficSplitRequest, request: Request, author: Admin) -> ModelHistory:
    """Serve a fraction of the clients, always the same ones, with a version. Requires an admin key."""
    return await _split_traffic(request, name, "canary", body, author)


@router.post("/v1/models/{name}/shadow", responses=_CHANGE)
async def start_shadow(name: str, body: TrafficSplitRequest, request: Request, author: Admin) -> ModelHistory:
    """Run a version on a fraction of the images, too, and discard its output. Requires an admin key."""
    return await _split_traffic(request, name, "shadow", body, author)


@router.post("/v1/models/{name}/promote", responses=_CHANGE)
async def promote(name: str, request: Request, author: Admin, body: ReasonBody | None = None) -> ModelHistory:
    """Serve all clients with the canary. Requires an admin key."""
    reason = body.reason if body else ""
    return await _change(request, name, lambda each: each.promote(name, author=author, reason=reason))


@router.post("/v1/models/{name}/rollback", responses=_CHANGE)
async def roll_back(name: str, request: Request, author: Admin, body: ReasonBody | None = None) -> ModelHistory:
    """Stop a canary or shadow, or serve the previously active version again, at once while it is still loaded.

    Requires an admin key.
    """
    reason = body.reason if body else ""
    return await _change(request, name, lambda each: each.roll_back(name, author=author, reason=reason))


async def _split_traffic(
    request: Request, name: str, role: Literal["canary", "shadow"], body: TrafficSplitRequest, author: str
) -> ModelHistory:
    split = (name, role, body.version, body.traffic_fraction)
    return await _change(request, name, lambda each: each.deploy_as(*split, author=author, reason=body.reason))


async def _change(request: Request, name: str, change: Change) -> ModelHistory:
    """Change the registry, apply the change at once, and return the model."""
    repository = get_state(request).model_repository
    if repository.registry is None:
        raise RegistryConflict(_NO_REGISTRY)
    try:
        await asyncio.to_thread(change, repository.registry)
    except ArtifactError as error:
        raise RegistryConflict(f"that version cannot be served: {error}") from error
    except RegistryError as error:  # on a read-only or full disk
        raise RegistryConflict(str(error)) from error
    await repository.reconcile()
    return await _get_status(repository, name)


async def _get_status(repository: ModelRepository, name: str) -> ModelHistory:
    statuses = await asyncio.to_thread(repository.list_statuses)  # reads files
    return next(status for status in statuses if status.name == name)
