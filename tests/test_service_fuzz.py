"""Requests generated from the OpenAPI document get documented responses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serve_fake import read_address, start_fake_server

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
MAX_EXAMPLES = int(os.environ.get("USEG_FUZZ_EXAMPLES", "3"))
"""Examples per operation."""
TIMEOUT_S = 900


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="useg[dev] is not installed: schemathesis is missing")
def test_generated_requests_get_documented_responses(tmp_path: Path) -> None:
    with start_fake_server(
        stderr=subprocess.DEVNULL, shutdown_delay_s=0, category_names_file=tmp_path / "names.json"
    ) as process:
        url = read_address(process).rstrip("/")
        command = [str(SCHEMATHESIS), "run", f"{url}/openapi.json", "--url", url, "--phases", "fuzzing"]
        command += ["--max-examples", str(MAX_EXAMPLES), "--checks", CHECKS, "--continue-on-failure"]
        command += ["--seed", "1", "--warnings", "off", "-H", "X-Request-Timeout-Ms: 30000"]
        environment = {**os.environ, "NO_COLOR": "1"}
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, cwd=tmp_path, timeout=TIMEOUT_S, env=environment, check=False
            )
        finally:
            process.terminate()
    assert run.returncode == 0, run.stdout
    counts = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert counts
    assert counts[1] == counts[2]
    assert int(counts[1]) > 30
