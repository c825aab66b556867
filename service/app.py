"""The service as an ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from model.backends.runtime import open_session
from model.contract import Contract
from model.errors import UsegError
from service.answers import Answer
from service.body import read_body
from service.boundary import SEGMENT_ROUTE, Boundary
from service.connection import finish_for_client
from service.deployment import Deployment, Opener
from service.errors import answer_error, find_kind
from service.media import choose_media
from service.options import read_options
from service.pages import FRESH, INDEX, PAGE_FILES
from service.reference import SEGMENT_REQUEST, SEGMENT_RESPONSES, describe_problems
from service.schemas import Liveness, ModelInfo, Readiness
from service.settings import Settings
from service.telemetry import Stopwatch, Telemetry

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the routes work with, as `app.state.parts`."""

    settings: Settings
    deployment: Deployment
    telemetry: Telemetry


def create_app(settings: Settings, *, opener: Opener | None = None) -> FastAPI:
    """The service; `opener` gives the artifact, by default the one in the settings."""
    telemetry = Telemetry()
    opener = opener or partial(open_session, settings.artifact, backend=settings.backend, threads=settings.threads)
    app = FastAPI(
        title="useg",
        summary="Instance, semantic and panoptic segments, from a network whose training needs no human mask.",
        version="1",
        docs_url=None,  # FastAPI's pages load their scripts from a CDN; the service works offline
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_live,
    )
    app.state.parts = Parts(settings=settings, deployment=Deployment(opener, settings, telemetry), telemetry=telemetry)
    app.include_router(router)
    app.add_middleware(Boundary, telemetry=telemetry)
    for error in (UsegError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(error, _answer_error)
    return app


@router.post(SEGMENT_ROUTE, responses=SEGMENT_RESPONSES, openapi_extra=SEGMENT_REQUEST, response_class=Response)
async def segment(request: Request) -> Response:
    """The segments of the picture in the body."""
    parts = _get_parts(request)
    deadline = asyncio.get_running_loop().time() + parts.settings.deadline_s
    media = choose_media(",".join(request.headers.getlist("accept")))
    options = read_options(request.query_params)
    request.state.task = options.task
    pipeline = parts.deployment.require()
    stopwatch = Stopwatch(parts.telemetry)
    with pipeline.admit():
        with stopwatch.time("read"):
            content = await read_body(request, parts.settings.limit_bytes, deadline)
        work = pipeline.segment(content, options, media, deadline, stopwatch)
        answer = await finish_for_client(request, work, deadline)
    return _respond(answer, pipeline.contract, stopwatch)


@router.get("/livez")
async def live() -> Liveness:
    """Whether the process answers at all."""
    return Liveness(status="alive")


@router.get("/readyz", responses=describe_problems(503))
async def ready(request: Request) -> Readiness:
    """Whether pictures are taken: the artifact passed its checks and is warm."""
    contract = _get_parts(request).deployment.require().contract
    return Readiness(status="ready", model=ModelInfo(name=contract.name, version=contract.version))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    parts = _get_parts(request)
    parts.deployment.describe()
    return Response(parts.telemetry.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page for people."""
    return FileResponse(INDEX, headers=FRESH)


@router.get("/page/{path:path}", include_in_schema=False)
async def page_file(path: str, request: Request) -> Response:
    """A script, style or picture of the page."""
    return await PAGE_FILES.get_response(path, request.scope)


@asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    deployment: Deployment = app.state.parts.deployment
    await deployment.start()
    try:
        yield
    finally:
        await deployment.stop()


async def _answer_error(request: Request, error: Exception) -> Response:
    request.state.problem = find_kind(error).slug
    return answer_error(error, request.state.request_id)


def _get_parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


def _respond(answer: Answer, contract: Contract, stopwatch: Stopwatch) -> Response:
    headers = {
        "Vary": "Accept",
        "Server-Timing": stopwatch.render(),
        "X-Model-Version": quote(contract.version, safe="+"),
    }
    if answer.notes:
        headers["X-Image-Notes"] = "; ".join(answer.notes)
    return Response(answer.content, headers=headers, media_type=answer.media)
