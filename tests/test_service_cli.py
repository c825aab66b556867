"""`useg serve` and `useg create-api-key`: output, exit status, signals, and no import of the training stack."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fake_service import draw_halves, save
from serve_fake import TIMEOUT_S, read_address, start_fake_server

from model.cli import main
from model.errors import ConfigError
from service.server import bind

ENVIRONMENT = {name: text for name, text in os.environ.items() if not name.startswith("USEG_")}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model", *arguments]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)


def test_serve_reports_a_missing_artifact_in_one_line(tmp_path: Path) -> None:
    ended = run("serve", "--port", "0", "--artifact", str(tmp_path))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("useg: ")]
    assert (ended.returncode, ended.stdout, len(errors)) == (1, "", 1)
    assert "contract.json" in errors[0]
    assert "Traceback" not in ended.stderr


def test_serve_suggests_the_setting_that_a_misspelt_variable_meant() -> None:
    ended = run("serve", USEG_PROT="80")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "useg: unknown setting USEG_PROT, did you mean USEG_PORT?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prot", "80"), "Did you mean --port?"),
        (("--port", "70000"), "port: Input should be less than or equal to 65535"),
        (("--host", "0.0.0.0"), "refusing to listen on 0.0.0.0 without authentication"),
    ],
)
def test_serve_rejects_an_invalid_option_in_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert words in captured.err


def test_a_port_in_use_is_reported_by_its_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_server_prints_its_address_answers_and_exits_with_0_after_a_signal(end: signal.Signals) -> None:
    with start_fake_server(shutdown_delay_s=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            address = read_address(process)
            curl = process.stdout.readline().strip()
            response = httpx.post(curl.split()[-1], files={"file": save(draw_halves())}, timeout=TIMEOUT_S)
        finally:
            process.send_signal(end)
        assert process.wait(TIMEOUT_S) == 0
        assert curl == f"curl -F file=@photo.jpg {address}v1/segment"
        assert response.json()["segments_info"][0]["area"] == 28 * 28
        assert "Traceback" not in process.stderr.read()


def test_after_sigterm_readiness_fails_and_requests_are_still_answered() -> None:
    with start_fake_server(shutdown_delay_s=1.5, log_format="json") as process:
        assert process.stderr is not None
        with httpx.Client(base_url=read_address(process), timeout=TIMEOUT_S) as client:
            assert client.get("readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            while (ready := client.get("readyz")).status_code == 200:
                pass
            assert ready.json()["type"] == "urn:useg:problem:shutting-down"
            response = client.post("v1/segment", files={"file": save(draw_halves())})
        assert process.wait(TIMEOUT_S) == 0
        assert (response.status_code, response.headers["connection"]) == (200, "close")
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    (logged,) = [line for line in lines if line.get("route") == "/v1/segment"]
    assert (logged["status"], logged["request_id"]) == (200, response.headers["x-request-id"])


def test_the_admin_port_serves_health_and_metrics_without_a_key() -> None:
    with start_fake_server(admin_port=0, log_format="json", api_keys=f"alice:{'0' * 64}") as process:
        assert process.stderr is not None
        address = read_address(process)
        line = next(line for line in process.stderr if "health and metrics on port" in line)
        admin = f"http://127.0.0.1:{json.loads(line)['message'].split()[-1]}"
        statuses = [
            httpx.get(admin + path).status_code for path in ("/livez", "/readyz", "/metrics", "/v1/segment", "/")
        ]
        assert statuses == [200, 200, 200, 404, 404]
        assert [httpx.get(address + path).status_code for path in ("livez", "metrics")] == [200, 401]
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(TIMEOUT_S) == 0


def test_create_api_key_prints_a_key_and_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create-api-key", "alice"]) == 0
    created = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256(created["key"].encode()).hexdigest()
    assert created["line"] == f"alice:{digest}"
    assert len(created["key"]) == 43
    assert main(["create-api-key", "a:b"]) != 0


def test_the_service_imports_neither_torch_nor_training() -> None:
    code = "import sys, service.app, service.cli; print(sorted({'torch', 'training'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert ended.stdout == "[]\n"
