"""Objects that the routes share."""

from dataclasses import dataclass

from starlette.requests import Request

from service.middleware.api_keys import ApiKeyStore
from service.rollout.model_repository import ModelRepository
from service.settings import Settings
from service.telemetry.metrics import Telemetry
from service.telemetry.tracing import Tracing


@dataclass(frozen=True, kw_only=True)
class AppState:
    """The state of one app, as `app.state.useg`."""

    settings: Settings
    model_repository: ModelRepository
    telemetry: Telemetry
    api_keys: ApiKeyStore
    """Keys that requests need; none for an open service."""
    admin_keys: ApiKeyStore
    """Keys that may change what is served."""
    tracing: Tracing | None = None


def get_state(request: Request) -> AppState:
    """Return the state of the app that received a request."""
    state: AppState = request.app.state.useg
    return state
