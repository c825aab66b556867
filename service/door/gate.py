"""Who may come in, and how often: decided from the headers alone, before a body is read."""

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import HeadersTooLarge
from service.door.keys import Keyring
from service.door.quotas import Quotas
from service.settings import Settings

_OPEN_PATHS = ("/", "/dashboard", "/livez", "/readyz", "/openapi.json", "/docs", "/v2/health/live", "/v2/health/ready")
_OPEN_FOLDERS = ("/page/", "/docs/")
_MOST_HEADERS = 64


class Gate:
    """Pure ASGI middleware; writes the caller's name to `scope["state"]["owner"]`.

    With keys, all but the page, its documentation and health needs one. Without, the caller is its address.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keyring: Keyring) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._quotas = Quotas()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("state", {}).get("is_admin"):
            self._require(scope)
        await self._app(scope, receive, send)

    def _require(self, scope: Scope) -> None:
        if len(scope["headers"]) > _MOST_HEADERS:
            raise HeadersTooLarge(f"{len(scope['headers'])} headers, at most {_MOST_HEADERS} are taken: send fewer")
        client = scope.get("client") or ("unknown", 0)
        owner, rate_per_s, burst = client[0], self._settings.rate_per_s, self._settings.burst
        if self._keyring and not is_open(scope["path"]):
            key = self._keyring.require(read_key(Headers(scope=scope)))
            owner = key.name
            rate_per_s = rate_per_s if key.rate_per_s is None else key.rate_per_s
            burst = burst if key.burst is None else key.burst
        scope.setdefault("state", {})["owner"] = owner
        if scope["method"] == "POST":
            self._quotas.take(owner, rate_per_s, burst, time.monotonic())


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


def read_key(headers: Headers) -> str:
    """The key in a request, or an empty text."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
