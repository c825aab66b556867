"""The page for people, as static files."""

import os
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import PathLike, StaticFiles
from starlette.types import Scope

PAGE = Path(__file__).parent / "page"
INDEX = PAGE / "index.html"
DASHBOARD = PAGE / "dashboard.html"
DOCS = PAGE / "docs.html"
FRESH = {"Cache-Control": "no-cache"}
"""Kept by the browser, but asked about each time: a new release must not meet an old script."""


class PageFiles(StaticFiles):
    """The files beside the index; `get_response` gives one, or raises HTTPException 404."""

    def __init__(self) -> None:
        super().__init__(directory=PAGE)

    def file_response(
        self, full_path: PathLike, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(FRESH)
        return response


PAGE_FILES = PageFiles()
