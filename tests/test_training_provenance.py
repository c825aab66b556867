"""Provenance of runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from training.data.dataset import PseudoLabelDataset
from training.trainer.provenance import git_commit, make_provenance


def test_provenance_has_no_paths(tiny_store: PseudoLabelDataset) -> None:
    provenance = make_provenance(tiny_store.read_config(), 8)
    assert provenance["photos"]["count"] == 8
    assert "/" not in str(provenance)


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *settings, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("1")
    assert git_commit(tracked) is None
    git(tmp_path, "init")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    untracked.write_text("installed inside an unrelated checkout")
    assert (git_commit(tracked), git_commit(untracked)) == (commit, None)
    tracked.write_text("2")
    assert git_commit(tracked) == f"{commit}-dirty"
