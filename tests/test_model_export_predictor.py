import shutil
from pathlib import Path

import pytest

from model.backends.loader import load_session
from model.errors import ConfigError
from model.export.predictor import write_drift_reference


@pytest.fixture
def artifact(tmp_path: Path, tiny_artifact: Path) -> Path:
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def test_the_drift_reference_is_stored_and_the_artifact_still_loads(artifact: Path, tiny_photos: Path) -> None:
    write_drift_reference(artifact, tiny_photos, 5, "cpu", 1)
    contract, _ = load_session(artifact, threads=1)
    assert sorted(contract.drift_reference) == ["score", "segments", "void"]
    assert sum(contract.drift_reference["segments"].counts) == 5
    assert sum(contract.drift_reference["void"].counts) == 5


def test_the_drift_reference_is_deterministic_and_replaced(artifact: Path, tiny_photos: Path) -> None:
    first = write_drift_reference(artifact, tiny_photos, 5, "cpu", 1)
    assert write_drift_reference(artifact, tiny_photos, 5, "cpu", 1) == first
    assert sum(write_drift_reference(artifact, tiny_photos, 100, "cpu", 1).drift_reference["void"].counts) == 8


def test_a_folder_without_photos_leaves_the_artifact_unchanged(tmp_path: Path, artifact: Path) -> None:
    before = (artifact / "contract.json").read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "note.txt").write_text("no photo")
    with pytest.raises(ConfigError, match="has no readable photo"):
        write_drift_reference(artifact, tmp_path / "photos", 5, "cpu", 1)
    assert (artifact / "contract.json").read_bytes() == before
