"""OpenVINO and NNCF without their telemetry."""

import sys
from importlib import import_module
from typing import Any

from model.errors import BackendUnavailable

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The package `openvino`; see `import_silent`."""
    return import_silent("openvino", "backend openvino", "openvino")


def import_nncf() -> Any:
    """The package `nncf`; see `import_silent`."""
    return import_silent("nncf", "quantise", "quantise")


def import_silent(name: str, purpose: str, extra: str) -> Any:
    """A package of Intel's that tells nobody of it.

    At their import these send an event to Google Analytics and leave an identity in the home folder, unless they find
    no `openvino_telemetry`: so none can be found meanwhile. Raises BackendUnavailable, with the extra to install, if
    the package is not there.
    """
    held = {_TELEMETRY: sys.modules[_TELEMETRY]} if _TELEMETRY in sys.modules else {}
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{purpose}: {error.name} is not installed: install useg[{extra}]") from error
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(held)
