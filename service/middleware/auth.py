"""Authentication and rate limiting, applied before the request body is read."""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import HeadersTooLarge, RateLimited
from service.middleware.api_keys import ApiKeyStore
from service.responses.problems import make_error_response
from service.settings import Settings

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
_MAX_HEADERS = 64
_MAX_BUCKETS = 10_000
"""The number of addresses is not bounded: the bucket that was idle longest is dropped, as it is full again."""
_ADMIN_PORT_PATHS = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class AuthMiddleware:
    """Pure ASGI middleware that sets `scope["state"]["owner"]` to the name of the API key, or the client's address.

    If there are API keys, all paths but the pages, the API documentation and health checks require one.
    """

    def __init__(self, app: ASGIApp, settings: Settings, api_keys: ApiKeyStore) -> None:
        self._app = app
        self._settings = settings
        self._api_keys = api_keys
        self._has_api_keys = bool(api_keys)
        self._limiter = TokenBucketLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("state", {}).get("is_admin_port"):
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if len(scope["headers"]) > _MAX_HEADERS:
            raise HeadersTooLarge(f"{len(scope['headers'])} headers, at most {_MAX_HEADERS} are allowed")
        client = scope.get("client") or ("unknown", 0)
        owner, rate_per_s, burst = client[0], self._settings.rate_limit_rps, self._settings.rate_limit_burst
        if self._has_api_keys and not is_public(scope["path"]):
            key = self._api_keys.authenticate(read_api_key(Headers(scope=scope)))
            owner = key.name
            rate_per_s = rate_per_s if key.rate_limit_rps is None else key.rate_limit_rps
            burst = burst if key.burst is None else key.burst
        scope.setdefault("state", {})["owner"] = owner
        if scope["method"] == "POST":
            self._limiter.acquire(owner, rate_per_s, burst, time.monotonic())


def is_public(path: str) -> bool:
    """Return whether a path needs no API key."""
    return path in _PUBLIC_PATHS or path.startswith(_PUBLIC_FOLDERS)


def read_api_key(headers: Headers) -> str:
    """Return the API key of a request, or an empty string."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


@dataclass(kw_only=True)
class _TokenBucket:
    tokens: float
    filled: float


class TokenBucketLimiter:
    """A token bucket for each client; `now` is the time of any clock in seconds."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _TokenBucket] = OrderedDict()

    def acquire(self, owner: str, rate_limit_rps: float, burst: int, now: float) -> None:
        """Take one token of `owner`, whose bucket holds `burst` and gains `rate_limit_rps`; a rate of 0 is no limit.

        Raises RateLimited with the time until the next token.
        """
        if rate_limit_rps <= 0.0:
            return
        bucket = self._buckets.pop(owner, None) or _TokenBucket(tokens=burst, filled=now)
        bucket.tokens = min(float(burst), bucket.tokens + (now - bucket.filled) * rate_limit_rps)
        bucket.filled = now
        self._buckets[owner] = bucket
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1.0:
            raise RateLimited(
                f"rate limit exceeded: {rate_limit_rps:g} requests per second, bursts of {burst}",
                retry_after_s=max(1, math.ceil((1.0 - bucket.tokens) / rate_limit_rps)),
            )
        bucket.tokens -= 1.0


class AdminPortApp:
    """ASGI app for the admin port: health and metrics of the main app, without API keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _ADMIN_PORT_PATHS:
            await make_error_response(HTTPException(404), "-")(scope, receive, send)
            return
        scope.setdefault("state", {})["is_admin_port"] = True
        await self._app(scope, receive, send)
