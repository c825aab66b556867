"""The web pages: segmenting photos, the dashboard, and Swagger UI. No file comes from another host."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from service.middleware import make_page_csp

router = APIRouter(include_in_schema=False)

_WEB_FILES = StaticFiles(directory=Path(__file__).parent.parent / "web")
_SWAGGER_FILES = StaticFiles(packages=[("fastapi_offline", "static")])


@router.get("/")
async def index(request: Request) -> Response:
    """The page that segments photos."""
    return await _WEB_FILES.get_response("index.html", request.scope)


@router.get("/dashboard")
async def dashboard(request: Request) -> Response:
    """The dashboard, from the service's own metrics."""
    return await _WEB_FILES.get_response("dashboard.html", request.scope)


@router.get("/static/{path:path}")
async def static_file(path: str, request: Request) -> Response:
    """A script, style sheet or image of the pages."""
    return await _WEB_FILES.get_response(path, request.scope)


@router.get("/docs")
async def docs() -> Response:
    """Swagger UI."""
    return _make_docs_page()


@router.get("/docs/{path:path}")
async def docs_file(path: str, request: Request) -> Response:
    """A script or style sheet of Swagger UI."""
    return await _SWAGGER_FILES.get_response(path, request.scope)


@cache
def _make_docs_page() -> HTMLResponse:
    page = get_swagger_ui_html(
        title="useg API",
        openapi_url="openapi.json",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="static/logo.svg",
        swagger_ui_parameters={"validatorUrl": None, "tryItOutEnabled": True},
    )
    (script,) = re.findall(r"<script>(.*?)</script>", bytes(page.body).decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Swagger UI styles its elements inline, and shows images of responses from blobs.
    page.headers["Content-Security-Policy"] = make_page_csp(scripts=f"'sha256-{digest}'", styles="'unsafe-inline'")
    return page
