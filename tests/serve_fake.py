"""`python serve_fake.py`: serves the fake model of `fake_service`, with the settings in `USEG_*` variables."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120


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
    from service.settings import read_settings

    run(read_settings(), load_artifact=open_fake)
