"""The service as an ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from model.contract import Contract
from model.errors import UsegError
from service.inference.loaded_model import ModelLoader
from service.inference.pipeline import Pipeline, SegmentRequest
from service.middleware.api_keys import ApiKeyStore, load_api_keys
from service.middleware.auth import AuthMiddleware
from service.middleware.request_context import SEGMENT_ROUTE, RequestMiddleware
from service.oip.routes import router as oip_router
from service.pages import DASHBOARD, DOCS, FRESH, INDEX, PAGE_FILES
from service.requests.body import read_uploads
from service.requests.context import RequestContext, cancel_on_disconnect, get_routing_key, parse_request_context
from service.requests.parameters import parse_parameters
from service.responses.encoders import EncodedResponse
from service.responses.media_types import MEDIA_TYPES, MULTI_RESULT_MEDIA_TYPES, negotiate_media_type
from service.responses.problems import find_problem_type, make_error_response
from service.responses.schemas import Liveness, ModelInfo, Readiness
from service.rollout.controller import ArtifactLoader
from service.rollout.model_repository import ModelRepository
from service.rollout.registry_watcher import make_version_source
from service.routes.category_names import router as names_router
from service.routes.models import router as models_router
from service.routes.openapi import SEGMENT_REQUEST, SEGMENT_RESPONSES, DocumentedApi, document_problems
from service.settings import Settings
from service.state import AppState, get_state
from service.telemetry.logging import record_event_loop_lag
from service.telemetry.metrics import Telemetry
from service.telemetry.stage_timer import StageTimer
from service.telemetry.tracing import make_span_exporter

router = APIRouter()


def create_app(
    settings: Settings, *, opener: ModelLoader | None = None, open_artifact: ArtifactLoader | None = None
) -> FastAPI:
    """The service; `opener` gives its artifact, by default that of the settings, `open_artifact` one in a folder."""
    telemetry = Telemetry()
    telemetry.output_drift_limit.set(settings.canary_max_psi)
    fleet = ModelRepository(
        make_version_source(settings, telemetry, opener, open_artifact), telemetry, settings.default_model
    )
    sink = make_span_exporter(settings.otlp_endpoint)
    keyring = load_api_keys(settings.api_key_file, settings.api_keys)
    administrators = load_api_keys(settings.admin_api_key_file, settings.admin_api_keys)
    app = _make_api()
    app.state.parts = AppState(
        settings=settings, model_repository=fleet, telemetry=telemetry, administrators=administrators, sink=sink
    )
    app.include_router(router)
    app.include_router(models_router)
    app.include_router(names_router)
    app.include_router(oip_router)
    app.add_middleware(
        AuthMiddleware, settings=settings, keyring=keyring.join(administrators) if keyring else ApiKeyStore()
    )
    app.add_middleware(
        RequestMiddleware,
        telemetry=telemetry,
        is_draining=lambda: fleet.is_draining,
        find_tally=fleet.find_tally,
        sink=sink,
        trace_sample_ratio=settings.trace_sample_ratio,
    )
    for error in (UsegError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(error, _answer_error)
    return app


@router.post(SEGMENT_ROUTE, responses=SEGMENT_RESPONSES, openapi_extra=SEGMENT_REQUEST, response_class=Response)
async def segment(request: Request) -> Response:
    """The segments of the pictures in the body."""
    parts = get_state(request)
    claim = parse_request_context(request, parts.settings.request_timeout_s)
    accept = ",".join(request.headers.getlist("accept"))
    negotiate_media_type(accept)  # what nobody can mend is told before a body is sent
    options = parse_parameters(request.query_params)
    request.state.task = options.tasks[0]
    rollout = parts.model_repository.find(options.model)
    request.state.tally = rollout.tally
    request.state.stopwatch = stopwatch = StageTimer(parts.telemetry)
    with rollout.admit(claim, get_routing_key(request)) as route:
        with stopwatch.time("read"):
            uploads = await read_uploads(
                request, parts.settings.max_body_bytes, claim.deadline, parts.settings.client_timeout_s
            )
        options = parse_parameters(request.query_params, uploads.parameters)
        request.state.task = options.tasks[0]
        media = negotiate_media_type(
            accept, MULTI_RESULT_MEDIA_TYPES if uploads.is_batch or len(options.tasks) > 1 else MEDIA_TYPES
        )

        async def ask(pipeline: Pipeline, claim: RequestContext) -> tuple[EncodedResponse, Contract]:
            request.state.tally = pipeline.tally
            asked = SegmentRequest(uploads=uploads, options=options, media=media, request_id=request.state.request_id)
            answer = await pipeline.segment(asked, claim, stopwatch, is_final=route.is_final(pipeline))
            return answer, pipeline.contract

        answer, contract = await cancel_on_disconnect(request, route.answer(ask), claim.deadline)
    rollout.mirror(upload.content for upload in uploads.files)
    return _respond(answer, contract, stopwatch)


@router.get("/livez")
async def live() -> Liveness:
    """Whether the process answers at all."""
    return Liveness(status="alive")


@router.get("/readyz", responses=document_problems(503))
async def ready(request: Request) -> Readiness:
    """Whether pictures are taken: the artifact passed its checks and is warm."""
    contract = get_state(request).model_repository.require_ready().contract
    return Readiness(status="ready", model=ModelInfo(name=contract.name, version=contract.version))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    parts = get_state(request)
    parts.model_repository.describe()
    return Response(parts.telemetry.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page for people."""
    return FileResponse(INDEX, headers=FRESH)


@router.get("/dashboard", include_in_schema=False)
async def dashboard() -> Response:
    """What the service does at the moment, for people, from its own metrics."""
    return FileResponse(DASHBOARD, headers=FRESH)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The interface, described for people, from files of our own alone."""
    return FileResponse(DOCS, headers=FRESH)


@router.get("/page/{path:path}", include_in_schema=False)
async def page_file(path: str, request: Request) -> Response:
    """A script, style or picture of the page."""
    return await PAGE_FILES.get_response(path, request.scope)


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    parts: AppState = app.state.parts
    watch = asyncio.create_task(record_event_loop_lag(parts.telemetry))
    await parts.model_repository.start()
    try:
        yield
    finally:
        watch.cancel()
        await parts.model_repository.stop()
        if parts.sink:
            await asyncio.to_thread(parts.sink.close)


def _make_api() -> FastAPI:
    return DocumentedApi(
        title="useg",
        summary="Instance, semantic and panoptic segments, from a network whose training needs no human mask.",
        version="1",
        docs_url=None,  # FastAPI's pages load their scripts from a CDN; the service works offline
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_live,
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    request.state.problem = find_problem_type(error).slug
    return make_error_response(error, request.state.request_id, request.url.path)


def _respond(answer: EncodedResponse, contract: Contract, stopwatch: StageTimer) -> Response:
    headers = {
        "Vary": "Accept",
        "Server-Timing": stopwatch.render(),
        "X-Model-Version": quote(contract.version, safe="+"),
    }
    if answer.notes:
        headers["X-Image-Notes"] = "; ".join(answer.notes)
    return Response(answer.content, answer.status, headers, answer.media)
