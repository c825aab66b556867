"""The service as an ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from service.auth import load_api_keys, require_unique_names
from service.inference.loading import ArtifactLoader
from service.metrics import Telemetry, record_event_loop_lag
from service.middleware import AppState, RequestMiddleware
from service.oip.routes import health_router as oip_health_router
from service.oip.routes import router as oip_router
from service.oip.tensors import LENGTH_HEADER
from service.problems import REFERENCED_SCHEMAS
from service.rollout.model_repository import ModelRepository
from service.routes.category_names import router as category_names_router
from service.routes.models import health_router
from service.routes.models import router as models_router
from service.routes.pages import router as pages_router
from service.routes.segment import router as segment_router
from service.settings import Settings
from service.tracing import Tracing

_EXPOSED_HEADERS = (
    "ETag",
    LENGTH_HEADER,
    "Retry-After",
    "Server-Timing",
    "X-Image-Warnings",
    "X-Model-Version",
    "X-Request-ID",
)
"""Headers of responses that pages of other origins may read."""

_ROUTERS = (
    segment_router,
    models_router,
    category_names_router,
    health_router,
    oip_health_router,
    oip_router,
    pages_router,
)


class Api(FastAPI):
    """FastAPI, with the schemas in its OpenAPI document that FastAPI cannot see."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            schemas = super().openapi()["components"]["schemas"]
            _, referenced = models_json_schema(
                [(schema, "validation") for schema in REFERENCED_SCHEMAS],
                ref_template="#/components/schemas/{model}",
            )
            for name, schema in referenced["$defs"].items():
                schemas.setdefault(name, schema)
        return self.openapi_schema or {}


def create_app(settings: Settings, load_artifact: ArtifactLoader | None = None) -> FastAPI:
    """Create the service; `load_artifact` loads a directory, by default for the backend in the settings."""
    telemetry = Telemetry()
    telemetry.output_drift_limit.set(settings.canary_max_psi)
    repository = ModelRepository(settings, telemetry, load_artifact)
    api_keys = load_api_keys(settings.api_key_file, settings.api_keys)
    admin_keys = load_api_keys(settings.admin_api_key_file, settings.admin_api_keys)
    require_unique_names(api_keys + admin_keys)
    state = AppState(
        settings=settings,
        model_repository=repository,
        telemetry=telemetry,
        api_keys=api_keys + admin_keys if api_keys else (),
        admin_keys=admin_keys,
        tracing=Tracing(settings.otlp_endpoint, settings.trace_sample_ratio) if settings.otlp_endpoint else None,
    )
    app = Api(
        title="useg",
        summary="Instance, semantic and panoptic segmentation by a network that is trained without human labels.",
        version="1",
        docs_url=None,  # FastAPI's own page loads its scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_run,
    )
    app.state.useg = state
    for router in _ROUTERS:
        app.include_router(router)
    app.add_middleware(RequestMiddleware, state=state)
    if state.tracing:
        app.add_middleware(state.tracing.instrument)
    if settings.allowed_origins:  # outermost, so that pages of other origins can read errors, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    for error in (HTTPException, RequestValidationError):
        app.add_exception_handler(error, _raise)  # in place of FastAPI's handlers
    return app


@asynccontextmanager
async def _run(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.useg
    lag = asyncio.create_task(record_event_loop_lag(state.telemetry))
    await state.model_repository.start()
    try:
        yield
    finally:
        lag.cancel()
        await state.model_repository.stop()
        if state.tracing:
            await asyncio.to_thread(state.tracing.close)


async def _raise(_request: Request, error: Exception) -> Response:
    """Leave an error to `RequestMiddleware`."""
    raise error
