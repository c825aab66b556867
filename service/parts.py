"""What the routes work with."""

from dataclasses import dataclass

from starlette.requests import Request

from service.door.keys import Keyring
from service.registry.fleet import Fleet
from service.settings import Settings
from service.telemetry.metrics import Telemetry
from service.telemetry.spans import SpanSink


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One app's, as `app.state.parts`."""

    settings: Settings
    fleet: Fleet
    telemetry: Telemetry
    administrators: Keyring
    """The keys of those who may change what is served."""
    sink: SpanSink | None = None


def get_parts(request: Request) -> Parts:
    """The parts of the app that a request came to."""
    parts: Parts = request.app.state.parts
    return parts
