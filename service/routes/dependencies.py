"""FastAPI dependencies of the routes: API keys in the documentation, and access for administrators."""

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request

from model.errors import PermissionDenied, Unauthorized
from service.auth import authenticate
from service.middleware import get_state
from service.settings import is_loopback

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
