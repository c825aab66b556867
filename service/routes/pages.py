"""The web pages: segmenting photos, the dashboard, and Swagger UI. No file comes from another host."""

import base64
import hashlib
import os
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import PathLike, StaticFiles
from starlette.types import Scope

from service.middleware import make_page_csp

router = APIRouter(include_in_schema=False)


class _RevalidatedFiles(StaticFiles):
    """Static files; `get_response` raises HTTPException 404 for one that does not exist.

    Browsers keep a file but ask whether it has changed, so that all files of a page are of one release.
    """

    def file_response(
        self, full_path: PathLike, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "no-cache"
        return response


_WEB_FILES = _RevalidatedFiles(directory=Path(__file__).parent.parent / "web")
_SWAGGER_FILES = _RevalidatedFiles(packages=[("fastapi_offline", "static")])


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
