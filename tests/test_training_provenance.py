import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from training.data.dataset import PseudoLabelDataset
from training.trainer.provenance import git_commit, is_same_provenance, make_provenance


def test_labels_made_before_a_setting_existed_had_its_default(tiny_store: PseudoLabelDataset) -> None:
    labels = tiny_store.read_config()
    now = make_provenance(labels, 8)
    before = {**now, "labels": {name: value for name, value in now["labels"].items() if name != "stuff_crf"}}
    assert is_same_provenance(before, now)
    assert not is_same_provenance(before, make_provenance(replace(labels, stuff_crf=True), 8))
    assert not is_same_provenance(now, make_provenance(replace(labels, threshold=0.5), 8))
    assert not is_same_provenance(now, make_provenance(labels, 9))
    assert not is_same_provenance({**now, "start": {"sha256": "0"}}, now)


def test_sources_name_no_folder_of_this_machine(tiny_store: PseudoLabelDataset) -> None:
    described = make_provenance(tiny_store.read_config(), 8)
    assert described["photos"]["count"] == 8
    assert "/" not in str(described)


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *settings, *words], capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_the_checkout_that_knows_the_file(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    known, foreign = tmp_path / "known.py", tmp_path / "foreign.py"
    known.write_text("1")
    assert git_commit(known) is None
    git(tmp_path, "init")
    git(tmp_path, "add", "known.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    foreign.write_text("installed inside a checkout of something else")
    assert (git_commit(known), git_commit(foreign)) == (commit, None)
    known.write_text("2")
    assert git_commit(known) == f"{commit}-dirty"
