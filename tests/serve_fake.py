"""`python serve_fake.py`: serves the fake model of `fake_service`, with the settings in `USEG_*` variables."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from model.errors import ConfigError
from model.validation import describe_errors
from service.settings import PREFIX, Settings, check_variable_names

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings in `USEG_*` variables, as `useg serve` reads them. Raises ConfigError."""
    check_variable_names(environment)
    names = {PREFIX + name.upper(): name for name in Settings.model_fields}
    try:
        return Settings.model_validate({names[name]: text for name, text in environment.items() if name in names})
    except ValidationError as error:
        raise ConfigError(describe_errors(error)) from error


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

    from service.cli import run

    run(read_settings(), load_artifact=open_fake)
