"""The outermost layer of the service: ids for every request, its measurement, and an answer to any error."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.responses.problems import CLIENT_CLOSED_REQUEST, PROBLEM_TYPES, find_problem_type, make_error_response
from service.telemetry.metrics import Telemetry, outcome_of_status
from service.telemetry.stage_timer import StageTimer
from service.telemetry.tracing import RequestSpan, SpanExporter, begin_trace
from service.telemetry.version_stats import VersionStats

logger = logging.getLogger(__name__)

SEGMENT_ROUTE = "/v1/segment"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_REJECTION_REASONS = {kind.slug: kind.rejection for kind in PROBLEM_TYPES.values() if kind.rejection}


class RequestMiddleware:
    """Pure ASGI middleware.

    Not Starlette's BaseHTTPMiddleware, behind which an endpoint does not hear that its client hung up.
    """

    def __init__(
        self,
        app: ASGIApp,
        telemetry: Telemetry,
        is_draining: Callable[[], bool] = lambda: False,
        find_tally: Callable[[], VersionStats | None] = lambda: None,
        sink: SpanExporter | None = None,
        trace_sample_ratio: float = 1.0,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        telemetry.http_request_duration.labels(
            "POST", SEGMENT_ROUTE, HTTPStatus.OK.value
        )  # from 0, as Telemetry.init_series says
        for reason in _REJECTION_REASONS.values():
            telemetry.requests_rejected.labels(reason)
        self._is_draining = is_draining
        self._find_tally = find_tally
        self._sink = sink
        self._trace_share = trace_sample_ratio if sink else 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = choose_request_id(Headers(scope=scope).get("x-request-id"))
        state["trace"] = begin_trace(Headers(scope=scope).get("traceparent"), self._trace_share)
        started, started_ns = time.perf_counter(), time.time_ns()
        status = sent_bytes = 0

        async def send_marked(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                self._mark(scope, MutableHeaders(scope=message))
            sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:  # whatever it was, the caller gets the one error body
            if status:
                raise
            state["problem"] = find_problem_type(error).slug
            await make_error_response(error, state["request_id"], scope["path"])(scope, receive, send_marked)
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started, sent_bytes)
            if self._sink and state["trace"].is_sampled:
                self._sink.send(make_span(scope, status or CLIENT_CLOSED_REQUEST, started_ns))

    def _mark(self, scope: Scope, headers: MutableHeaders) -> None:
        """Add what every answer has."""
        headers["X-Request-ID"] = scope["state"]["request_id"]
        headers["traceparent"] = scope["state"]["trace"].render()
        for name, text in SECURITY_HEADERS.items():
            headers[name] = text
        if headers.get("content-type", "").startswith("text/html"):
            headers["Content-Security-Policy"] = PAGE_CSP
        if self._is_draining():
            headers["Connection"] = "close"  # a client that keeps its connection would lose it within a request

    def _record(self, scope: Scope, status: int, seconds: float, sent_bytes: int) -> None:
        method, route, state = method_label(scope), route_template(scope), scope["state"]
        self._telemetry.http_request_duration.labels(method, route, status).observe(seconds)
        if method == "POST" and (rejection := _REJECTION_REASONS.get(state.get("problem"))):
            self._telemetry.requests_rejected.labels(rejection).inc()
        if method == "POST" and (route == SEGMENT_ROUTE or "stopwatch" in state):
            self._record_segmentation(state, status, seconds, sent_bytes)
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "response_bytes": sent_bytes,
            "request_id": state["request_id"],
            "trace_id": state["trace"].trace_id,
            "span_id": state["trace"].span_id,
            "owner": state.get("owner"),
        }
        template = "%s %s %d %.1f ms, request %s"
        logger.info(template, method, route, status, seconds * 1000, state["request_id"], extra={"fields": fields})

    def _record_segmentation(self, state: dict[str, object], status: int, seconds: float, sent_bytes: int) -> None:
        task, outcome = str(state.get("task", "unknown")), outcome_of_status(status)
        tally = state["tally"] if "tally" in state else self._find_tally()
        which = (tally.model, tally.version) if isinstance(tally, VersionStats) else ("none", "none")
        self._telemetry.requests.labels(*which, task, outcome).inc()
        if isinstance(tally, VersionStats):
            tally.take_request(outcome, seconds)
        if outcome == "ok":
            self._telemetry.request_duration.labels(task).observe(seconds)
            self._telemetry.response_bytes.observe(sent_bytes)
        if outcome == "cancelled":
            stopwatch = state.get("stopwatch")
            self._telemetry.requests_cancelled.labels(
                stopwatch.stage if isinstance(stopwatch, StageTimer) else "read"
            ).inc()


def choose_request_id(given: str | None) -> str:
    """The caller's id where it is short and plain, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


def make_span(scope: Scope, status: int, started_ns: int) -> RequestSpan:
    """What a collector of traces is told, in OpenTelemetry's terms; neither the path nor the query, nor who asked."""
    method, route, state = method_label(scope), route_template(scope), scope["state"]
    stopwatch = state.get("stopwatch")
    return RequestSpan(
        name=f"{method} {route}",
        trace=state["trace"],
        started_ns=started_ns,
        ended_ns=time.time_ns(),
        attributes={
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "useg.request_id": state["request_id"],
            **({"useg.task": str(state["task"])} if "task" in state else {}),
        },
        is_failure=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
        laps=tuple(stopwatch.laps) if isinstance(stopwatch, StageTimer) else (),
    )


def method_label(scope: Scope) -> str:
    """The method, of a bounded number of them."""
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def route_template(scope: Scope) -> str:
    """The template of the route that was taken, never the path itself: that one has no bounds."""
    return getattr(scope.get("route"), "path", "unmatched")


SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""With every answer."""

PAGE_CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The `Content-Security-Policy` of pages: scripts and styles come from files of ours, never from the page itself."""
