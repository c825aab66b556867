"""Who may change what is served: whoever has an administrator's key, or sits at a machine that nobody else reaches."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from model.errors import PermissionDenied, Unauthorized
from service.middleware.auth import read_api_key
from service.settings import Settings, is_loopback
from service.state import get_state

LOCAL = "local"
"""What the history calls who needed no key."""
_ADMIN_KEY_HINT = "set admin_api_key_file (`useg create-api-key NAME` makes a key and its line)"
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""What a proxy adds, behind which a request from this machine may come from anywhere."""
_SAME_ORIGIN = ("same-origin", "none")


def require_administrator(request: Request) -> str:
    """The name of the administrator who asks, for the history and the log.

    Raises Unauthorized for no key or an unknown one, Forbidden for a caller's key, and where there are no keys for
    administrators unless the service has no keys at all and is for this machine alone.
    """
    parts = get_state(request)
    if parts.administrators:
        return _require_admin_key(request)
    if requires_api_key(parts.settings) or not is_loopback(parts.settings.host):
        raise PermissionDenied(f"this service has no administrators: {_ADMIN_KEY_HINT}")
    _require_local_request(request.headers)
    return LOCAL


def requires_api_key(settings: Settings) -> bool:
    """Whether callers need a key."""
    return bool(settings.api_key_file or settings.api_keys)


def _require_admin_key(request: Request) -> str:
    parts = get_state(request)
    try:
        return parts.administrators.require(read_api_key(request.headers)).name
    except Unauthorized as error:
        if requires_api_key(parts.settings):  # the gate knew the key, or the request would not be here
            raise PermissionDenied("this key is a caller's: send an administrator's") from error
        raise Unauthorized("no administrator's key, or an unknown one: send 'Authorization: Bearer KEY'") from error


def _require_local_request(headers: Headers) -> None:
    """Raise Forbidden for what comes through a proxy, or from a page of somebody else's in a browser here."""
    if any(name in headers for name in _PROXY_HEADERS):
        raise PermissionDenied(f"the request came through a proxy, from where is not known: {_ADMIN_KEY_HINT}")
    host = headers.get("host", "")
    try:
        name, origin = urlsplit(f"//{host}").hostname, urlsplit(headers.get("origin", f"//{host}")).netloc
    except ValueError as error:
        raise PermissionDenied(f"the request is for {host!r}, which is no address") from error
    if not is_loopback(name or ""):
        raise PermissionDenied(f"the request is for {host!r}, not for an address of this machine: {_ADMIN_KEY_HINT}")
    is_own = origin == host
    if not is_own or headers.get("sec-fetch-site", "none") not in _SAME_ORIGIN:
        raise PermissionDenied("the request comes from a page of another site: it may not change what is served here")
