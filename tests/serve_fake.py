"""`python serve_fake.py`: serves the fake model of `fake_service`, with the settings in `USEG_*` variables."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from service.cli import app, run
from service.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Return the settings in `USEG_*` variables, as `useg serve` reads them."""
    with patch.dict(os.environ, environment, clear=True):
        _, bound, _ = app.parse_args([], exit_on_error=False, print_error=False)
    return bound.arguments.get("settings") or Settings()


def start_fake_server(*, stderr: int = subprocess.PIPE, **settings: object) -> "subprocess.Popen[str]":
    """Start a server of the fake model on a free port; its first line of output ends with its address."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("USEG_")}
    given = {f"USEG_{name.upper()}": str(value) for name, value in ({"port": 0} | settings).items()}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **given},
    )


def read_address(process: "subprocess.Popen[str]") -> str:
    """Return the base URL of a server, with a slash at its end, once it is ready."""
    assert process.stdout is not None
    return process.stdout.readline().removeprefix("useg is ready: ").strip()


if __name__ == "__main__":
    from fake_service import open_fake

    run(read_settings(os.environ), load_artifact=open_fake)
