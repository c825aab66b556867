"""The command: what it prints, how it ends, and that it starts without the training stack."""

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
from service.__main__ import bind, main
from service.settings import Settings

WAIT_S = 30
ENVIRONMENT = {name: text for name, text in os.environ.items() if not name.startswith("USEG_")}
SERVE_FAKE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    "from fake_service import open_fake; from service.__main__ import main\n"
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
    command = [sys.executable, "-c", SERVE_FAKE, "--port", "0"]
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


def test_the_service_starts_without_torch() -> None:
    code = "import sys, service.app, service.__main__; print(sorted({'torch', 'training'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert ended.stdout == "[]\n"
