"""Requests that a machine makes up from the service's own description get answers that keep it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_service_cli import ENVIRONMENT, SERVE_FAKE

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LIMIT_S = 300


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="useg[dev] is not installed: schemathesis is missing")
def test_made_up_requests_get_documented_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE_FAKE, "--port", "0", "--shutdown-delay-s", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("useg is ready: ").strip().rstrip("/")
        asked = [str(SCHEMATHESIS), "run", f"{url}/openapi.json", "--url", url, "--phases", "fuzzing"]
        asked += [
            "--max-examples",
            "3",
            "--checks",
            CHECKS,
            "--continue-on-failure",
            "--seed",
            "1",
            "--warnings",
            "off",
        ]
        environment = {**os.environ, "NO_COLOR": "1"}
        try:
            ended = subprocess.run(
                asked, capture_output=True, text=True, cwd=tmp_path, timeout=LIMIT_S, env=environment, check=False
            )
        finally:
            process.terminate()
    assert ended.returncode == 0, ended.stdout
    told = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert told
    assert told[1] == told[2]
    assert int(told[1]) > 30
