"""The README's commands, run as they stand there but for names of files and the size of the work."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

LIMIT_S = 120
SMALL = {
    "useg-train label": "--side-px 56 --maskcut-n 2 --threshold 0.6 --pca-dim 6 --thing-clusters 3 --stuff-clusters 4",
    "useg-train fit": "--preset tiny",
    "useg-model export": "--score 0",
}


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def list_commands(readme: str) -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def fill_in(command: str, words: dict[str, object]) -> list[str]:
    small = next((options for start, options in SMALL.items() if command.startswith(start)), "")
    filled = [str(words.get(word, word)) for word in shlex.split(f"{command} {small}")]
    return [str(Path(sys.executable).with_name(filled[0])), *filled[1:]]


@pytest.fixture
def served(tiny_artifact: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "--artifact", str(tiny_artifact), "--port", str(port)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("USEG_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=plain) as process:
        assert process.stdout
        assert "useg is ready" in process.stdout.readline()
        yield port
        process.terminate()


@pytest.mark.slow
def test_the_training_commands_run_in_their_order(
    tmp_path: Path, readme: str, tiny_encoder: Path, tiny_truth: Path
) -> None:
    words: dict[str, object] = {
        "PHOTOS": tiny.draw_photos(tmp_path / "photos"),
        "FILE_OR_URL": tiny_encoder,
        "PHOTO": tmp_path / "photos" / "0.png",
        "SET": tiny_truth,
        "u2seg.pth": tiny.write_checkpoint(tmp_path / "u2seg.pth"),
        "800": 3,
        "OTHER": tmp_path / "run",
        **{name: tmp_path / name for name in ("sheet.jpg", "masks.png")},
        **{name: tmp_path / name.lower() for name in ("STORE", "RUN", "ARTIFACT", "REPORT", "OFFICIAL")},
    }
    commands = [line for line in list_commands(readme) if line.startswith(("useg-train", "useg-model"))]
    assert [command.split()[1] for command in commands] == [
        *("label", "show", "fit", "export", "eval", "compare", "match", "name", "segment", "import"),
    ]
    for command in commands:
        ended = subprocess.run(
            fill_in(command, words), capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=tmp_path
        )
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_the_curl_line_is_answered(tmp_path: Path, readme: str, served: int) -> None:
    photo = tiny.draw_photos(tmp_path / "photos") / "0.png"
    (line,) = (line for line in list_commands(readme) if line.startswith("curl"))
    command = shlex.split(line.replace("photo.jpg", str(photo)).replace(":8000", f":{served}"))
    ended = subprocess.run([*command, "--fail", "--silent"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert '"segments_info"' in ended.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_the_smoke_test_passes_on_a_service_in_order(tmp_path: Path, repository: Path, served: int) -> None:
    photo = tiny.draw_photos(tmp_path / "photos") / "0.png"
    command = [repository / "deploy" / "smoke.sh", photo, f"http://127.0.0.1:{served}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 9


@pytest.mark.parametrize("target", ["serve", "test", "lint"])
def test_make_has_the_targets_that_are_named(repository: Path, readme: str, target: str) -> None:
    assert f"make {target}" in readme
    ended = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=False, cwd=repository)
    assert ended.returncode == 0, ended.stderr


def test_it_stays_short_and_its_files_exist(repository: Path, readme: str) -> None:
    assert len(readme.splitlines()) <= 150
    for name in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (repository / name).is_file(), name
