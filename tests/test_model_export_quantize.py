"""Quantization adds an int8 network for OpenVINO, or is refused if predictions change too much."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import FixedSession, make_contract

from model.backends.loader import load_session
from model.backends.openvino import require_int8_instructions
from model.backends.session import AutoSession
from model.contract import Int8Accuracy, RawOutputs, Thresholds, read_contract
from model.detail import NetworkInput, prepare_image
from model.errors import BackendUnavailable, ConfigError, ParityError
from model.export.export import ExportConfig, export_run
from model.export.parity_checks import stack_images
from model.export.quantize import MIN_ACCURACY, measure_accuracy, quantize_artifact, require_accuracy
from model.images import read_image

pytestmark = pytest.mark.skipif(find_spec("nncf") is None, reason="useg[quantize] is not installed")


def has_int8_instructions() -> bool:
    try:
        require_int8_instructions()
    except BackendUnavailable:
        return False
    return True


needs_vnni = pytest.mark.skipif(not has_int8_instructions(), reason="the processor has neither VNNI nor AMX")
MIN_PHOTOS = 58
LOOSE = {"clusters_equal": 0.9, "panoptic_quality": 0.6}
"""A network trained for four steps measures 0.98 and 0.82."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many photos as are needed, a duplicate and another file."""
    folder = tiny.draw_photos(tmp_path_factory.mktemp("calibration") / "photos", count=MIN_PHOTOS)
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, tiny_artifact: Path, photos: Path) -> Path:
    """The tiny artifact with an int8 network; not to be changed."""
    artifact = Path(shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("int8") / "artifact"))
    quantize_artifact(artifact, photos, min_accuracy=LOOSE)
    return artifact


def test_the_contract_describes_the_quantization(int8: Path, tiny_artifact: Path) -> None:
    contract, source = read_contract(int8), read_contract(tiny_artifact)
    added = {"int8.xml", "int8.bin", "golden-int8.npz"}
    assert set(contract.files) == set(source.files) | added
    assert {path.name for path in int8.iterdir()} == {path.name for path in tiny_artifact.iterdir()} | added
    assert contract.int8
    assert contract.int8.photos == 50
    assert 0.9 <= contract.int8.clusters_equal < 1.0
    assert contract.provenance["quantization"]["photos"] == 8
    assert replace(contract, int8=None, files=source.files, provenance=source.provenance) == source


@needs_vnni
def test_int8_predictions_are_similar_to_the_artifacts(int8: Path, photos: Path) -> None:
    contract, session = load_session(int8, backend="openvino-int8", threads=1)
    assert session.backend == "openvino-int8"
    photo = stack_images(prepare_image(read_image(photos / "3.png").image, contract).inputs)
    given, exact = session.run(*photo)[0], load_session(int8, threads=1)[1].run(*photo)[0]
    assert 0.0 < np.abs(given.scores - exact.scores).max() < 0.1
    assert (given.semantic.argmax(0) == exact.semantic.argmax(0)).mean() > 0.9


def test_without_int8_instructions_the_backend_is_unavailable(int8: Path) -> None:
    if not has_int8_instructions():
        with pytest.raises(BackendUnavailable, match="neither VNNI nor AMX"):
            load_session(int8, backend="openvino-int8", threads=1)
        _, session = load_session(int8, backend="auto", threads=1)
        assert isinstance(session, AutoSession)
        assert "neither VNNI nor AMX" in session.skipped_backends["openvino-int8"]
    else:
        assert load_session(int8, backend="auto", threads=1)[1].backend == "openvino-int8"


def test_too_low_an_accuracy_leaves_the_artifact_as_it_is(int8: Path, tmp_path: Path, photos: Path) -> None:
    out = Path(shutil.copytree(int8, tmp_path / "artifact"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ParityError, match=r"panoptic_quality is below 0\.999 \(photos 50, clusters_equal 0\.9"):
        quantize_artifact(out, photos, min_accuracy={**LOOSE, "panoptic_quality": 0.999})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_duplicates_and_other_files_do_not_count_as_photos(tmp_path: Path, tiny_artifact: Path, photos: Path) -> None:
    fewer = Path(shutil.copytree(photos, tmp_path / "photos"))
    (fewer / "5.png").unlink()
    with pytest.raises(
        ConfigError, match="has 57 distinct readable photos: expected at least 8 to calibrate and 50 to validate"
    ):
        quantize_artifact(tiny_artifact, fewer)
    assert read_contract(tiny_artifact).int8 is None


@pytest.mark.slow
def test_an_int8_stored_artifact_can_be_quantized_twice(tmp_path: Path, tiny_run: Path, photos: Path) -> None:
    config = ExportConfig(precision="int8-stored", score_threshold=0.0, min_component_area_fraction=0.0)
    export_run(tiny_run, tmp_path / "stored", config, [])
    first = quantize_artifact(tmp_path / "stored", photos, min_accuracy=LOOSE)
    again = quantize_artifact(tmp_path / "stored", photos, min_accuracy=LOOSE)
    assert again.int8 == first.int8
    assert read_contract(tmp_path / "stored") == again
    assert list(tmp_path.iterdir()) == [tmp_path / "stored"]


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"network": "panoptic_cascade"}])
def test_fp16_and_cascades_are_not_quantized(artifact: Path, photos: Path, changes: dict[str, Any]) -> None:
    replace(read_contract(artifact), **changes).write(artifact)
    with pytest.raises(ConfigError, match="int8 needs a mask_transformer in one of fp32, fp16-stored, int8-stored"):
        quantize_artifact(artifact, photos)


CONTRACT = make_contract(
    3, 1, stride_px=1, max_detections=1, thresholds=Thresholds(score_threshold=0.3, min_stuff_area_fraction=0.0)
)
IMAGE = NetworkInput(pixels=np.zeros((3, 8, 8), np.uint8), size=(8, 8))


def draw(rows: int, cluster: int = 0, score: float = 0.9) -> RawOutputs:
    """A thing over the top rows, stuff below it."""
    masks = np.zeros((1, 8, 8), np.float32)
    masks[0, :rows] = 1.0
    semantic = np.zeros((2, 8, 8), np.float32)
    semantic[0, :rows], semantic[1, rows:] = 9.0, 9.0
    return RawOutputs(
        scores=np.array([score], np.float32),
        clusters=np.array([cluster]),
        boxes=np.zeros((1, 4), np.float32),
        masks=masks,
        semantic=semantic,
    )


@pytest.mark.parametrize(
    ("references", "outputs", "clusters_equal", "panoptic_quality"),
    [
        ([draw(4)], [draw(4)], 1.0, 1.0),
        ([draw(4)], [draw(3)], 56 / 64, (24 / 32 + 32 / 40) / 2),  # of the thing and of the stuff
        ([draw(4)], [draw(4, score=0.1)], 0.5, 2 / 3),  # two segments and one: 2 x 1 match of 3
        ([draw(4)] * 2, [draw(4), draw(4, cluster=2)], 0.75, 0.75),  # in the second photo, the stuff alone
        ([draw(8, score=0.1)], [draw(8, score=0.1)], 1.0, 0.0),
    ],
    ids=["equal", "moved border", "lost segment", "another cluster in one of two photos", "no segments"],
)
def test_accuracy_is_that_computed_by_hand(
    references: list[RawOutputs], outputs: list[RawOutputs], clusters_equal: float, panoptic_quality: float
) -> None:
    photos = [IMAGE] * len(references)
    accuracy = measure_accuracy(FixedSession(*references), FixedSession(*outputs), photos, CONTRACT)
    assert (accuracy.photos, accuracy.clusters_equal) == (len(photos), clusters_equal)
    assert accuracy.panoptic_quality == pytest.approx(panoptic_quality)


@pytest.mark.parametrize("name", ["clusters_equal", "panoptic_quality"])
@pytest.mark.parametrize("value", [0.79, np.nan])
def test_a_value_below_its_threshold_is_named(name: str, value: float) -> None:
    sure = Int8Accuracy(photos=20, clusters_equal=0.8, panoptic_quality=0.85)
    require_accuracy(sure, MIN_ACCURACY)
    with pytest.raises(ParityError, match=rf"{name} is below .*photos 20.*{name} {value:.4g}"):
        require_accuracy(replace(sure, **{name: value}), MIN_ACCURACY)
