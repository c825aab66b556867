"""The command: what it prints, how it ends, and that it starts without the training stack."""

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

from model.errors import ConfigError
from service.cli import bind, main
from service.settings import Settings

WAIT_S = 30
ENVIRONMENT = {name: text for name, text in os.environ.items() if not name.startswith("USEG_")}
SERVE_FAKE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    "from fake_service import open_fake; from service.cli import main\n"
    "sys.exit(main(sys.argv[1:], opener=open_fake))"
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=environment, check=False)


def test_a_missing_artifact_ends_it_with_one_line(tmp_path: Path) -> None:
    ended = run("--port", "0", "--artifact", str(tmp_path))
    told = [line for line in ended.stderr.splitlines() if line.startswith("useg-serve: ")]
    assert (ended.returncode, ended.stdout, len(told)) == (1, "", 1)
    assert "contract.json" in told[0]
    assert "Traceback" not in ended.stderr


def test_a_wrong_setting_ends_it_with_one_line() -> None:
    ended = run(USEG_PROT="80")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "useg-serve: unknown setting USEG_PROT, did you mean USEG_PORT?\n"


def test_wrong_usage_ends_it_with_status_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--prot", "80"])
    assert ended.value.code == 2


def test_a_port_in_use_is_told_by_its_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bind(Settings(port=port))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_answers_and_leaves_quietly(end: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE_FAKE, "--port", "0", "--shutdown-delay-s", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            address = process.stdout.readline().removeprefix("useg is ready: ").strip()
            curl = process.stdout.readline().strip()
            answer = httpx.post(curl.split()[-1], files={"file": save(draw_halves())}, timeout=WAIT_S)
        finally:
            process.send_signal(end)
        assert process.wait(WAIT_S) == 0
        assert curl == f"curl -F file=@photo.jpg {address}v1/segment"
        assert answer.json()["segments_info"][0]["area"] == 28 * 28
        assert "Traceback" not in process.stderr.read()


def test_a_terminated_service_is_not_ready_answers_what_comes_and_leaves_with_0() -> None:
    command = [sys.executable, "-c", SERVE_FAKE, "--port", "0", "--shutdown-delay-s", "1.5", "--log-format", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().removeprefix("useg is ready: ").strip()
        with httpx.Client(base_url=address, timeout=WAIT_S) as client:
            assert client.get("readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            while (ready := client.get("readyz")).status_code == 200:
                pass
            assert ready.json()["type"] == "urn:useg:problem:draining"
            answer = client.post("v1/segment", files={"file": save(draw_halves())})
        assert process.wait(WAIT_S) == 0
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    (told,) = [line for line in lines if line.get("route") == "/v1/segment"]
    assert (told["status"], told["request_id"]) == (200, answer.headers["x-request-id"])
    assert told["trace_id"] in answer.headers["traceparent"]


def test_health_and_metrics_may_have_a_port_of_their_own_without_a_key() -> None:
    command = [sys.executable, "-c", SERVE_FAKE, "--port", "0", "--admin-port", "0", "--log-format", "json"]
    environment = {**ENVIRONMENT, "USEG_KEYS": f"alice:{'0' * 64}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().removeprefix("useg is ready: ").strip()
        line = next(line for line in process.stderr if "health and metrics on port" in line)
        admin = f"http://127.0.0.1:{json.loads(line)['message'].split()[-1]}"
        statuses = [
            httpx.get(admin + path).status_code for path in ("/livez", "/readyz", "/metrics", "/v1/segment", "/")
        ]
        assert statuses == [200, 200, 200, 404, 404]
        assert [httpx.get(address + path).status_code for path in ("livez", "metrics")] == [200, 401]
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(WAIT_S) == 0


def test_other_machines_are_not_served_without_keys_unless_that_is_meant() -> None:
    ended = run("--host", "0.0.0.0", "--port", "0")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("useg-serve: whoever reaches 0.0.0.0 could use the service")


def test_a_new_key_is_printed_with_its_line() -> None:
    key, line = run("--new-key", "alice").stdout.splitlines()
    digest = hashlib.sha256(key.removeprefix("key:  ").encode()).hexdigest()
    assert line == f"line: alice:{digest}"


def test_the_service_starts_without_torch() -> None:
    code = "import sys, service.app, service.cli; print(sorted({'torch', 'training'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert ended.stdout == "[]\n"
