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
from service.answers.answers import Answer
from service.answers.errors import answer_error, find_kind
from service.answers.media import ARCHIVES, MEDIA, choose_media
from service.answers.schemas import Liveness, ModelInfo, Readiness
from service.api.models import router as models_router
from service.api.names import router as names_router
from service.api.reference import SEGMENT_REQUEST, SEGMENT_RESPONSES, DocumentedApi, describe_problems
from service.artifact.deployment import Opener
from service.artifact.pipeline import Asked, Pipeline
from service.door.boundary import SEGMENT_ROUTE, Boundary
from service.door.gate import Gate
from service.door.keys import Keyring, read_keyring
from service.engine.queue import Claim
from service.oip.protocol import router as oip_router
from service.pages import DASHBOARD, DOCS, FRESH, INDEX, PAGE_FILES
from service.parts import Parts, get_parts
from service.registry.fleet import Fleet
from service.registry.follower import ArtifactOpener
from service.registry.registered import make_leader
from service.requests.claims import read_claim, read_routing_key
from service.requests.connection import finish_for_client
from service.requests.options import read_options
from service.requests.uploads import read_uploads
from service.settings import Settings
from service.telemetry.lag import watch_lag
from service.telemetry.metrics import Telemetry
from service.telemetry.spans import open_sink
from service.telemetry.stopwatch import Stopwatch

router = APIRouter()


def create_app(
    settings: Settings, *, opener: Opener | None = None, open_artifact: ArtifactOpener | None = None
) -> FastAPI:
    """The service; `opener` gives its artifact, by default that of the settings, `open_artifact` one in a folder."""
    telemetry = Telemetry()
    telemetry.drift_limit.set(settings.drift_limit)
    fleet = Fleet(make_leader(settings, telemetry, opener, open_artifact), telemetry, settings.default_model)
    sink = open_sink(settings.otlp_endpoint)
    keyring = read_keyring(settings.key_file, settings.keys)
    administrators = read_keyring(settings.admin_key_file, settings.admin_keys)
    app = _make_api()
    app.state.parts = Parts(
        settings=settings, fleet=fleet, telemetry=telemetry, administrators=administrators, sink=sink
    )
    app.include_router(router)
    app.include_router(models_router)
    app.include_router(names_router)
    app.include_router(oip_router)
    app.add_middleware(Gate, settings=settings, keyring=keyring.join(administrators) if keyring else Keyring())
    app.add_middleware(
        Boundary,
        telemetry=telemetry,
        is_draining=lambda: fleet.is_draining,
        find_tally=fleet.find_tally,
        sink=sink,
        trace_share=settings.trace_share,
    )
    for error in (UsegError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(error, _answer_error)
    return app


@router.post(SEGMENT_ROUTE, responses=SEGMENT_RESPONSES, openapi_extra=SEGMENT_REQUEST, response_class=Response)
async def segment(request: Request) -> Response:
    """The segments of the pictures in the body."""
    parts = get_parts(request)
    claim = read_claim(request, parts.settings.deadline_s)
    accept = ",".join(request.headers.getlist("accept"))
    choose_media(accept)  # what nobody can mend is told before a body is sent
    options = read_options(request.query_params)
    request.state.task = options.tasks[0]
    rollout = parts.fleet.find(options.model)
    request.state.tally = rollout.tally
    request.state.stopwatch = stopwatch = Stopwatch(parts.telemetry)
    with rollout.admit(claim, read_routing_key(request)) as route:
        with stopwatch.time("read"):
            uploads = await read_uploads(request, parts.settings.limit_bytes, claim.deadline, parts.settings.stall_s)
        options = read_options(request.query_params, uploads.parameters)
        request.state.task = options.tasks[0]
        media = choose_media(accept, ARCHIVES if uploads.is_batch or len(options.tasks) > 1 else MEDIA)

        async def ask(pipeline: Pipeline, claim: Claim) -> tuple[Answer, Contract]:
            request.state.tally = pipeline.tally
            asked = Asked(uploads=uploads, options=options, media=media, request_id=request.state.request_id)
            answer = await pipeline.segment(asked, claim, stopwatch, is_final=route.is_final(pipeline))
            return answer, pipeline.contract

        answer, contract = await finish_for_client(request, route.answer(ask), claim.deadline)
    rollout.mirror(upload.content for upload in uploads.files)
    return _respond(answer, contract, stopwatch)


@router.get("/livez")
async def live() -> Liveness:
    """Whether the process answers at all."""
    return Liveness(status="alive")


@router.get("/readyz", responses=describe_problems(503))
async def ready(request: Request) -> Readiness:
    """Whether pictures are taken: the artifact passed its checks and is warm."""
    contract = get_parts(request).fleet.require_ready().contract
    return Readiness(status="ready", model=ModelInfo(name=contract.name, version=contract.version))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    parts = get_parts(request)
    parts.fleet.describe()
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
    parts: Parts = app.state.parts
    watch = asyncio.create_task(watch_lag(parts.telemetry))
    await parts.fleet.start()
    try:
        yield
    finally:
        watch.cancel()
        await parts.fleet.stop()
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
    request.state.problem = find_kind(error).slug
    return answer_error(error, request.state.request_id, request.url.path)


def _respond(answer: Answer, contract: Contract, stopwatch: Stopwatch) -> Response:
    headers = {
        "Vary": "Accept",
        "Server-Timing": stopwatch.render(),
        "X-Model-Version": quote(contract.version, safe="+"),
    }
    if answer.notes:
        headers["X-Image-Notes"] = "; ".join(answer.notes)
    return Response(answer.content, answer.status, headers, answer.media)
