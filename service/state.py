"""What the routes work with."""

from dataclasses import dataclass

from starlette.requests import Request

from service.middleware.api_keys import ApiKeyStore
from service.rollout.model_repository import ModelRepository
from service.settings import Settings
from service.telemetry.metrics import Telemetry
from service.telemetry.tracing import SpanExporter


@dataclass(frozen=True, kw_only=True)
class AppState:
    """One app's, as `app.state.parts`."""

    settings: Settings
    model_repository: ModelRepository
    telemetry: Telemetry
    administrators: ApiKeyStore
    """The keys of those who may change what is served."""
    sink: SpanExporter | None = None


def get_state(request: Request) -> AppState:
    """The parts of the app that a request came to."""
    parts: AppState = request.app.state.parts
    return parts
