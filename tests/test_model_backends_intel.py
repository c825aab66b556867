"""OpenVINO and NNCF are imported without telling anybody."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from model.backends.intel import import_silent
from model.errors import BackendUnavailable

LIMIT_S = 120
WATCH = """
import sys
sys.addaudithook(lambda event, _: event in ("socket.connect", "socket.getaddrinfo") and print("network:", event))
from model.backends.intel import import_nncf, import_openvino
print(import_openvino().__name__, import_nncf().__name__, "openvino_telemetry" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None, reason="useg[quantise] is not installed")
def test_nothing_is_sent_and_nothing_is_left_in_the_home_folder(tmp_path: Path) -> None:
    # In a process of its own: NNCF is silent wherever pytest runs.
    ended = subprocess.run(
        [sys.executable, "-c", WATCH],
        capture_output=True, text=True, timeout=LIMIT_S, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.stdout == "openvino nncf False\n"
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_with_what_to_install() -> None:
    with pytest.raises(BackendUnavailable, match=r"^quantise: nowhere is not installed: install useg\[quantise\]$"):
        import_silent("nowhere", "quantise", "quantise")


def test_a_module_that_was_there_is_there_again() -> None:
    import_silent("json", "nothing", "none")
    assert "openvino_telemetry" not in sys.modules
