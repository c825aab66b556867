"""Liveness, readiness and metrics."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from service.responses.problems import document_problems
from service.responses.schemas import Liveness, ModelInfo, Readiness
from service.state import get_state

router = APIRouter(tags=["Health"], responses=document_problems(431))


@router.get("/livez")
async def live() -> Liveness:
    """Report that the process responds."""
    return Liveness(status="alive")


@router.get("/readyz", responses=document_problems(503))
async def ready(request: Request) -> Readiness:
    """Report whether images are accepted: the model passed its checks and is warmed up."""
    contract = get_state(request).model_repository.get_ready_pipeline().contract
    return Readiness(status="ready", model=ModelInfo(name=contract.name, version=contract.version))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Return all metrics in the Prometheus text format."""
    state = get_state(request)
    state.model_repository.update_metrics()
    return Response(state.telemetry.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
