"""ASGI middleware: request ids, metrics, the access log, every error's response, API keys, limits; access of admins.

It is pure ASGI: Starlette's BaseHTTPMiddleware would hide from an endpoint that its client disconnected.
"""

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import (
    HeadersTooLarge,
    ImageTooLarge,
    PermissionDenied,
    Unauthorized,
    UnsupportedMediaType,
    UploadTimeout,
)
from service.auth import ApiKey, TokenBucketLimiter, authenticate
from service.metrics import RequestRecord, Telemetry, outcome_of_status
from service.problems import (
    CLIENT_CLOSED_REQUEST,
    PROBLEM_TYPES,
    find_problem_type,
    make_error_response,
    unwrap_error,
)
from service.rollout.model_repository import ModelRepository
from service.settings import Settings, is_loopback
from service.tracing import Tracing

logger = logging.getLogger(__name__)

SEGMENT_ROUTE = "/v1/segment"
MAX_JSON_BYTES = 1024 * 1024
"""Maximum size of a body that holds no images."""
_IMAGE_PATHS = (SEGMENT_ROUTE, "/v1/decode", "/v2/")
_MAX_HEADERS = 64
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_REJECTION_REASONS = {kind.slug: kind.rejection for kind in PROBLEM_TYPES.values() if kind.rejection}
_PUBLIC_PATHS = (
    "/",
    "/dashboard",
    "/livez",
    "/readyz",
    "/openapi.json",
    "/docs",
    "/v2/health/live",
    "/v2/health/ready",
)
_PUBLIC_FOLDERS = ("/static/", "/docs/")

API_KEY = [
    Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
    Security(APIKeyHeader(name="X-API-Key", scheme_name="api_key", auto_error=False)),
]
"""Document that a route takes an API key; `RequestMiddleware` checks it before the body is read."""

LOCAL_ADMIN = "local"
"""Author of changes that needed no key."""
_ADMIN_KEY_HINT = "set admin_api_key_file (`useg create-api-key NAME` makes a key and its line)"
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers that a proxy adds; behind one, a request from this machine may come from anywhere."""

RESPONSE_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Headers of every response. Browsers keep a file but ask whether it has changed: all files of a page are of one
release."""


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


@dataclass(frozen=True, kw_only=True)
class AppState:
    """The state of one app, as `app.state.useg`."""

    settings: Settings
    model_repository: ModelRepository
    telemetry: Telemetry
    api_keys: tuple[ApiKey, ...]
    """Keys that requests need; none for an open service."""
    admin_keys: tuple[ApiKey, ...]
    """Keys that may change what is served."""
    tracing: Tracing | None = None


def get_state(request: Request) -> AppState:
    """Return the state of the app that received a request."""
    state: AppState = request.app.state.useg
    return state


class RequestMiddleware:
    """Checks each request before its body is read, and is the only place that turns an exception into a response.

    `scope["state"]` gets the `request_id` and the `owner`: the name of the API key, or the client's address.
    """

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state
        self._limiter = TokenBucketLimiter()
        state.telemetry.http_request_duration.labels("POST", SEGMENT_ROUTE, HTTPStatus.OK.value)
        for reason in _REJECTION_REASONS.values():
            state.telemetry.requests_rejected.labels(reason)

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
            if not state.get("is_admin_port"):
                self._authorize(scope)
            await self._app(scope, limit_body(scope, receive, self._state.settings), send_with_headers)
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

    def _authorize(self, scope: Scope) -> None:
        """Check the API key and the rate limit; without keys, or on public paths, the owner is the client's address."""
        if len(scope["headers"]) > _MAX_HEADERS:
            raise HeadersTooLarge(f"{len(scope['headers'])} headers, at most {_MAX_HEADERS} are allowed")
        client = scope.get("client") or ("unknown", 0)
        settings = self._state.settings
        owner, rate_per_s, burst = client[0], settings.rate_limit_rps, settings.rate_limit_burst
        is_public = scope["path"] in _PUBLIC_PATHS or scope["path"].startswith(_PUBLIC_FOLDERS)
        if self._state.api_keys and not is_public:
            key = authenticate(self._state.api_keys, Headers(scope=scope))
            owner = key.name
            rate_per_s = rate_per_s if key.rate_limit_rps is None else key.rate_limit_rps
            burst = burst if key.burst is None else key.burst
        scope["state"]["owner"] = owner
        if scope["method"] == "POST" and rate_per_s > 0.0:
            self._limiter.acquire(owner, rate_per_s, burst, time.monotonic())

    def _add_headers(self, scope: Scope, headers: MutableHeaders) -> None:
        """Add the headers of every response."""
        headers["X-Request-ID"] = scope["state"]["request_id"]
        headers.update(RESPONSE_HEADERS)
        if headers.get("content-type", "").startswith("text/html"):
            headers.setdefault("Content-Security-Policy", _PAGE_CSP)
        if self._state.model_repository.is_draining:
            headers["Connection"] = "close"  # a kept connection would be closed during a later request

    def _annotate_span(self, scope: Scope, status: int) -> None:
        """Add the route, ids and stages to the request's span; neither path, query nor client."""
        if not self._state.tracing:
            return
        state, route = scope["state"], route_template(scope)
        record: RequestRecord | None = state.get("record")
        attributes = {
            "http.route": route,
            "http.response.status_code": status,
            "useg.request_id": state["request_id"],
            **({"useg.task": record.task} if record else {}),
        }
        spans = tuple(record.spans) if record else ()
        self._state.tracing.annotate_request(f"{method_label(scope)} {route}", attributes, spans)

    def _record(self, scope: Scope, method: str, status: int, seconds: float, sent_bytes: int) -> None:
        route, state = route_template(scope), scope["state"]
        telemetry, tracing = self._state.telemetry, self._state.tracing
        telemetry.http_request_duration.labels(method, route, status).observe(seconds)
        if method == "POST" and (rejection := _REJECTION_REASONS.get(state.get("problem"))):
            telemetry.requests_rejected.labels(rejection).inc()
        if method == "POST" and (route == SEGMENT_ROUTE or "record" in state):
            self._record_segmentation(state.get("record"), status, seconds, sent_bytes)
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "response_bytes": sent_bytes,
            "request_id": state["request_id"],
            "owner": state.get("owner"),
        }
        if tracing and (ids := tracing.current_ids()):
            fields["trace_id"], fields["span_id"] = ids
        template = "%s %s %d %.1f ms, request %s"
        logger.info(template, method, route, status, seconds * 1000, state["request_id"], extra={"fields": fields})

    def _record_segmentation(self, record: RequestRecord | None, status: int, seconds: float, sent_bytes: int) -> None:
        """Record a segmentation; without a record, it was rejected before its route."""
        telemetry = self._state.telemetry
        task, stats = (record.task, record.stats) if record else ("unknown", self._state.model_repository.find_stats())
        outcome = outcome_of_status(status)
        telemetry.requests.labels(*(stats.labels if stats else ("none", "none")), task, outcome).inc()
        if stats:
            stats.record_duration("success" if outcome == "ok" else "fail", seconds)
        if outcome == "ok":
            telemetry.request_duration.labels(task).observe(seconds)
            telemetry.response_bytes.observe(sent_bytes)
        if outcome == "cancelled":
            telemetry.requests_cancelled.labels(record.stage if record else "read").inc()


def choose_request_id(given: str | None) -> str:
    """Return the client's id if it is short and plain, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


def method_label(scope: Scope) -> str:
    """Return the method as a metric label with a bounded number of values."""
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def route_template(scope: Scope) -> str:
    """Return the template of the matched route, since the number of paths is not bounded."""
    return getattr(scope.get("route"), "path", "unmatched")


def limit_body(scope: Scope, receive: Receive, settings: Settings) -> Receive:
    """Return a `receive` that bounds the size of the body and the time that the client takes to send it.

    That time ends at the request's deadline, `scope["state"]["deadline"]`, as soon as its route has set one.
    It raises ImageTooLarge, UnsupportedMediaType for a compressed body, and UploadTimeout.
    """
    max_bytes = settings.max_body_bytes if scope["path"].startswith(_IMAGE_PATHS) else MAX_JSON_BYTES
    latest = asyncio.get_running_loop().time() + settings.request_timeout_s
    received, is_complete = 0, False

    async def receive_limited() -> Message:
        nonlocal received, is_complete
        if is_complete:
            return await receive()
        if not received:
            _check_body_headers(Headers(scope=scope), max_bytes)
        left_s = scope["state"].get("deadline", latest) - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(left_s, settings.client_timeout_s)):  # unlike wait_for, takes what is there
                message = await receive()
        except TimeoutError as error:
            raise UploadTimeout("the body did not arrive in time: send a smaller one, or try again") from error
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise ImageTooLarge(f"the body has more than {max_bytes} bytes, the maximum: send a smaller file")
        is_complete = not message.get("more_body", False)
        return message

    return receive_limited


def _check_body_headers(headers: Headers, max_bytes: int) -> None:
    length, encoding = headers.get("content-length", ""), headers.get("content-encoding", "identity")
    if length.isdecimal() and int(length) > max_bytes:
        raise ImageTooLarge(f"the body has {length} bytes, the maximum is {max_bytes}: send a smaller file")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"unsupported Content-Encoding {encoding!r}: send the body uncompressed")


async def require_admin(request: Request) -> str:
    """Return the name of the administrator for the history and the log.

    Raises Unauthorized for a missing or unknown key and PermissionDenied for a key without admin rights. Without admin
    keys, only a server without any keys that listens on this machine alone allows changes.
    """
    state = get_state(request)
    if state.admin_keys:
        return _require_admin_key(request)
    if state.api_keys or not is_loopback(state.settings.host):
        raise PermissionDenied(f"this server has no admin keys: {_ADMIN_KEY_HINT}")
    _require_local_request(request.headers)
    return LOCAL_ADMIN


Admin = Annotated[str, Depends(require_admin)]


def _require_admin_key(request: Request) -> str:
    state = get_state(request)
    try:
        return authenticate(state.admin_keys, request.headers).name
    except Unauthorized as error:
        if state.api_keys:  # RequestMiddleware knew the key, or the request would not be here
            raise PermissionDenied("this API key has no admin rights: send an admin key") from error
        raise Unauthorized("missing or unknown admin key: send 'Authorization: Bearer KEY'") from error


def _require_local_request(headers: Headers) -> None:
    """Raise PermissionDenied for a request through a proxy, or from a page of another site in a local browser."""
    if any(name in headers for name in _PROXY_HEADERS):
        raise PermissionDenied(f"admin requests through a proxy need an admin key: {_ADMIN_KEY_HINT}")
    host = headers.get("host", "")
    try:
        name, origin = urlsplit(f"//{host}").hostname, urlsplit(headers.get("origin", f"//{host}")).netloc
    except ValueError as error:
        raise PermissionDenied(f"invalid Host header {host!r}") from error
    if not is_loopback(name or ""):
        raise PermissionDenied(f"the Host header {host!r} is not an address of this machine: {_ADMIN_KEY_HINT}")
    if origin != host or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise PermissionDenied("requests from a page of another site must not change what is served here")
