"""The outermost middleware: request ids, security headers, metrics, the access log, and the response to any error."""

import logging
import re
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.responses.problems import (
    CLIENT_CLOSED_REQUEST,
    PROBLEM_TYPES,
    find_problem_type,
    make_error_response,
    unwrap_error,
)
from service.rollout.model_repository import ModelRepository
from service.telemetry.metrics import Telemetry, outcome_of_status
from service.telemetry.recorders import StageTimer, VersionStats
from service.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

SEGMENT_ROUTE = "/v1/segment"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_REJECTION_REASONS = {kind.slug: kind.rejection for kind in PROBLEM_TYPES.values() if kind.rejection}

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Headers of every response."""


def make_page_csp(scripts: str = "", styles: str = "") -> str:
    """Return the `Content-Security-Policy` of a page: its own files, and what `scripts` and `styles` allow."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' {scripts}".strip(),
            f"style-src 'self' {styles}".strip(),
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


_PAGE_CSP = make_page_csp()


class RequestMiddleware:
    """Pure ASGI middleware, and the only place that turns an exception into a response.

    Starlette's BaseHTTPMiddleware would hide from an endpoint that its client disconnected.
    """

    def __init__(
        self,
        app: ASGIApp,
        telemetry: Telemetry,
        model_repository: ModelRepository,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        telemetry.http_request_duration.labels("POST", SEGMENT_ROUTE, HTTPStatus.OK.value)
        for reason in _REJECTION_REASONS.values():
            telemetry.requests_rejected.labels(reason)
        self._repository = model_repository
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, method = scope.setdefault("state", {}), method_label(scope)
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # routes know GET alone; the body is dropped below
        state["request_id"] = choose_request_id(Headers(scope=scope).get("x-request-id"))
        started = time.perf_counter()
        status = sent_bytes = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(scope, MutableHeaders(scope=message))
                self._annotate_span(scope, status)
            if method == "HEAD" and "body" in message:
                message = {**message, "body": b""}
            sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as raised:  # of any kind
            if status:
                raise
            error = unwrap_error(raised)
            state["problem"] = find_problem_type(error).slug
            await make_error_response(error, state["request_id"], scope["path"])(scope, receive, send_with_headers)
        finally:
            if not status:
                self._annotate_span(scope, CLIENT_CLOSED_REQUEST)
            self._record(scope, method, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started, sent_bytes)

    def _add_headers(self, scope: Scope, headers: MutableHeaders) -> None:
        """Add the headers of every response."""
        headers["X-Request-ID"] = scope["state"]["request_id"]
        for name, text in SECURITY_HEADERS.items():
            headers[name] = text
        if headers.get("content-type", "").startswith("text/html"):
            headers.setdefault("Content-Security-Policy", _PAGE_CSP)
        if self._repository.is_draining:
            headers["Connection"] = "close"  # a kept connection would be closed during a later request

    def _annotate_span(self, scope: Scope, status: int) -> None:
        """Add the route, ids and stages to the request's span; neither path, query nor client."""
        if not self._tracing:
            return
        state, route, timer = scope["state"], route_template(scope), scope["state"].get("timer")
        attributes = {
            "http.route": route,
            "http.response.status_code": status,
            "useg.request_id": state["request_id"],
            **({"useg.task": str(state["task"])} if "task" in state else {}),
        }
        stages = tuple(timer.spans) if isinstance(timer, StageTimer) else ()
        self._tracing.annotate_request(f"{method_label(scope)} {route}", attributes, stages)

    def _record(self, scope: Scope, method: str, status: int, seconds: float, sent_bytes: int) -> None:
        route, state = route_template(scope), scope["state"]
        self._telemetry.http_request_duration.labels(method, route, status).observe(seconds)
        if method == "POST" and (rejection := _REJECTION_REASONS.get(state.get("problem"))):
            self._telemetry.requests_rejected.labels(rejection).inc()
        if method == "POST" and (route == SEGMENT_ROUTE or "timer" in state):
            self._record_segmentation(state, status, seconds, sent_bytes)
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "response_bytes": sent_bytes,
            "request_id": state["request_id"],
            "owner": state.get("owner"),
        }
        if self._tracing and (ids := self._tracing.current_ids()):
            fields["trace_id"], fields["span_id"] = ids
        template = "%s %s %d %.1f ms, request %s"
        logger.info(template, method, route, status, seconds * 1000, state["request_id"], extra={"fields": fields})

    def _record_segmentation(self, state: dict[str, object], status: int, seconds: float, sent_bytes: int) -> None:
        task, outcome = str(state.get("task", "unknown")), outcome_of_status(status)
        stats = state["version_stats"] if "version_stats" in state else self._repository.find_stats()
        which = (stats.model, stats.version) if isinstance(stats, VersionStats) else ("none", "none")
        self._telemetry.requests.labels(*which, task, outcome).inc()
        if isinstance(stats, VersionStats):
            stats.record_request(outcome, seconds)
        if outcome == "ok":
            self._telemetry.request_duration.labels(task).observe(seconds)
            self._telemetry.response_bytes.observe(sent_bytes)
        if outcome == "cancelled":
            timer = state.get("timer")
            self._telemetry.requests_cancelled.labels(timer.stage if isinstance(timer, StageTimer) else "read").inc()


def choose_request_id(given: str | None) -> str:
    """Return the client's id if it is short and plain, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


def method_label(scope: Scope) -> str:
    """Return the method as a metric label with a bounded number of values."""
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def route_template(scope: Scope) -> str:
    """Return the template of the matched route, since the number of paths is not bounded."""
    return getattr(scope.get("route"), "path", "unmatched")
