"""What the routes work with."""

from dataclasses import dataclass

from starlette.requests import Request

from service.fleet import Fleet
from service.keys import Keyring
from service.settings import Settings
from service.spans import SpanSink
from service.telemetry import Telemetry


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
