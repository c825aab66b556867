"""The commands and links of README and docs, run with small inputs in place of the reader's files."""

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

from service.settings import Settings

LIMIT_S = 300
SMALL = {
    "useg label": "--encoder FILE_OR_URL --side-px 56 --pca-dim 6 --thing-clusters 3 --stuff-clusters 4",
    "useg train": "--preset tiny --threads 1",
    "useg export": "--score-threshold 0",
    "useg bench": "--batch-sizes 1 --rounds 1 --threads 1",
}
"""Options that make the documented commands fast."""
PAGES = (
    "README.md",
    "docs/training.md",
    "docs/scale.md",
    "docs/checkpoints.md",
    "docs/backends.md",
    "docs/operations.md",
    "docs/integrations.md",
)
NOT_RUN = ("useg serve", "useg export OFFICIAL --out", "useg quantize")
"""Starts of commands that never return, or that take minutes and have slow tests of their own."""


def list_commands(pages: list[str]) -> list[str]:
    """Return the `useg` commands of fenced and indented blocks in their order, each once, without comments."""
    lines = [line for page in pages for line in re.findall(r"^(?:    )?(useg .*[^\\])$", page, re.MULTILINE)]
    commands = dict.fromkeys(re.split(r"\s+#", line)[0].strip() for line in lines)
    return [command for command in commands if not command.startswith(NOT_RUN)]


def fill_in(command: str, words: dict[str, object], folder: Path) -> list[str]:
    """Return the arguments of a command: words in capitals are paths in `folder`, unless `words` has their values."""
    small = next((options for start, options in SMALL.items() if command.startswith(start)), "")
    arguments = [str(Path(sys.executable).with_name("useg"))]
    for word in shlex.split(f"{command} {small}")[1:]:
        is_path = re.match(r"[A-Z][A-Z_0-9]+(/|$)|\w+\.(jpg|json)$", word)
        arguments.append(str(words.get(word, folder / word if is_path else word)))
    return arguments


@pytest.fixture
def served(tiny_artifact: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "model", "serve", "--artifact", str(tiny_artifact), "--port", str(port)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("USEG_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=plain) as process:
        assert process.stdout
        assert "useg is ready" in process.stdout.readline()
        yield port
        process.terminate()


@pytest.mark.slow
def test_the_commands_of_the_documentation_run_in_their_order(
    tmp_path: Path, repository: Path, tiny_encoder: Path, tiny_truth: Path
) -> None:
    photos = tiny.draw_photos(tmp_path / "photos")
    words: dict[str, object] = {
        "PHOTOS": photos,
        "SOME_PHOTOS": photos,
        "FILE_OR_URL": tiny_encoder,
        "SET": tiny_truth,
        "u2seg.pth": tiny.write_checkpoint(tmp_path / "u2seg.pth"),
        "800": 3,
    }
    commands = list_commands([(repository / page).read_text(encoding="utf-8") for page in PAGES])
    assert len(commands) > 20
    for command in commands:
        ended = subprocess.run(
            fill_in(command, words, tmp_path),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            cwd=tmp_path,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_the_curl_command_returns_segments(tmp_path: Path, repository: Path, served: int) -> None:
    photo = tiny.draw_photos(tmp_path / "photos") / "0.png"
    readme = (repository / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^curl .*$", readme, re.MULTILINE)
    command = shlex.split(line.replace("photo.jpg", str(photo)).replace(":8000", f":{served}"))
    ended = subprocess.run([*command, "--fail", "--silent"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert '"segments_info"' in ended.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_the_smoke_test_passes_on_a_healthy_service(tmp_path: Path, repository: Path, served: int) -> None:
    photo = tiny.draw_photos(tmp_path / "photos") / "0.png"
    command = [repository / "deploy" / "smoke.sh", photo, f"http://127.0.0.1:{served}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 9


@pytest.mark.parametrize("target", ["serve", "test", "test-slow", "lint", "help"])
def test_make_has_the_documented_targets(repository: Path, target: str) -> None:
    ended = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=False, cwd=repository)
    assert ended.returncode == 0, ended.stderr


def test_the_readme_is_short(repository: Path) -> None:
    lines = (repository / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 100] == []


def test_links_between_pages_lead_to_files(repository: Path) -> None:
    for page in (
        *repository.glob("*.md"),
        *repository.glob("docs/**/*.md"),
        repository / "model" / "default" / "README.md",
    ):
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_every_setting_is_documented_with_its_default(repository: Path) -> None:
    page = (repository / "docs" / "operations.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}` |")), "")
        assert field.description
        assert field.description in row, name
        assert field.default_factory or field.default in (None, "") or f"`{field.default}`" in row, name
