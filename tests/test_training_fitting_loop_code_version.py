import shutil
import subprocess
from pathlib import Path

import pytest

from training.fitting.loop.code_version import read_commit


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *settings, *words], capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_the_checkout_that_knows_the_file(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    known, foreign = tmp_path / "known.py", tmp_path / "foreign.py"
    known.write_text("1")
    assert read_commit(known) is None
    git(tmp_path, "init")
    git(tmp_path, "add", "known.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    foreign.write_text("installed inside a checkout of something else")
    assert (read_commit(known), read_commit(foreign)) == (commit, None)
    known.write_text("2")
    assert read_commit(known) == f"{commit}-dirty"
