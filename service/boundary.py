"""The outermost layer of the service: an id for every request, its measurement, and an answer to any error."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import CLIENT_GONE, answer_error
from service.telemetry import Telemetry, name_outcome

logger = logging.getLogger(__name__)

SEGMENT_ROUTE = "/v1/segment"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_REJECTIONS = (413, 503)


class Boundary:
    """Pure ASGI middleware.

    Not Starlette's BaseHTTPMiddleware, behind which an endpoint does not hear that its client hung up.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:  # whatever it was, the caller gets the one error body
            if status:
                raise
            await answer_error(error, request_id)(scope, receive, send_marked)
        finally:
            self._record(scope, status or CLIENT_GONE, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        route = find_route(scope)
        state = scope["state"]
        self._telemetry.request_seconds.labels(method, route, status).observe(seconds)
        if route == SEGMENT_ROUTE and method == "POST":
            self._telemetry.requests.labels(state.get("task", "unknown"), name_outcome(status)).inc()
            if status in _REJECTIONS:
                self._telemetry.rejected.labels(state.get("problem", "unknown")).inc()
        logger.info("%s %s %d %.1f ms, request %s", method, route, status, seconds * 1000, state["request_id"])


def choose_request_id(given: str | None) -> str:
    """The caller's id where it is short and plain, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


def find_route(scope: Scope) -> str:
    """The template of the route that was taken, never the path itself: that one has no bounds."""
    return getattr(scope.get("route"), "path", "unmatched")
