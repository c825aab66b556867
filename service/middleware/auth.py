"""Who may come in, and how often: decided from the headers alone, before a body is read."""

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
_PUBLIC_FOLDERS = ("/page/", "/docs/")
_MAX_HEADERS = 64


class AuthMiddleware:
    """Pure ASGI middleware; writes the caller's name to `scope["state"]["owner"]`.

    With keys, all but the page, its documentation and health needs one. Without, the caller is its address.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keyring: ApiKeyStore) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._quotas = TokenBucketLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("state", {}).get("is_admin"):
            self._require(scope)
        await self._app(scope, receive, send)

    def _require(self, scope: Scope) -> None:
        if len(scope["headers"]) > _MAX_HEADERS:
            raise HeadersTooLarge(f"{len(scope['headers'])} headers, at most {_MAX_HEADERS} are taken: send fewer")
        client = scope.get("client") or ("unknown", 0)
        owner, rate_per_s, burst = client[0], self._settings.rate_limit_rps, self._settings.rate_limit_burst
        if self._keyring and not is_public(scope["path"]):
            key = self._keyring.require(read_api_key(Headers(scope=scope)))
            owner = key.name
            rate_per_s = rate_per_s if key.rate_limit_rps is None else key.rate_limit_rps
            burst = burst if key.burst is None else key.burst
        scope.setdefault("state", {})["owner"] = owner
        if scope["method"] == "POST":
            self._quotas.take(owner, rate_per_s, burst, time.monotonic())


def is_public(path: str) -> bool:
    """Whether a path needs no key."""
    return path in _PUBLIC_PATHS or path.startswith(_PUBLIC_FOLDERS)


def read_api_key(headers: Headers) -> str:
    """The key in a request, or an empty text."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


_MAX_BUCKETS = 10_000
"""Addresses have no bound: the one that was idle longest is forgotten, its allowance is full by then."""


@dataclass(kw_only=True)
class _TokenBucket:
    tokens: float
    filled: float


class TokenBucketLimiter:
    """A token bucket for every caller; `now` is any clock in seconds."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _TokenBucket] = OrderedDict()

    def take(self, owner: str, rate_limit_rps: float, burst: int, now: float) -> None:
        """One request of `owner`, who has `rate_limit_rps` on average and `burst` at once; a rate of 0 is no limit.

        Raises RateLimited, with the seconds until the next request may come.
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
                f"more than {rate_limit_rps:g} requests a second, {burst} at once: slow down",
                retry_after_s=max(1, math.ceil((1.0 - bucket.tokens) / rate_limit_rps)),
            )
        bucket.tokens -= 1.0


_ADMIN_PORT_PATHS = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class AdminPortApp:
    """The same application, of which nothing else is to be seen; its lifespan is led by the main door."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _ADMIN_PORT_PATHS:
            await make_error_response(HTTPException(404), "-")(scope, receive, send)
            return
        scope.setdefault("state", {})["is_admin"] = True
        await self._app(scope, receive, send)
