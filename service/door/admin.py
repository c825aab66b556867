"""Health and metrics on a port of their own, which callers need not reach and which asks for no key."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service.answers.errors import answer_error

_PATHS = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class AdminDoor:
    """The same application, of which nothing else is to be seen; its lifespan is led by the main door."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _PATHS:
            await answer_error(HTTPException(404), "-")(scope, receive, send)
            return
        scope.setdefault("state", {})["is_admin"] = True
        await self._app(scope, receive, send)
