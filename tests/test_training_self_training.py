"""Rounds of self-training: new labels, the acceptance test, resuming and plots."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_reference import annotate
from safetensors.torch import load_file, save_file

from model.errors import ConfigError, DatasetError, TrainingError
from training.data.dataset import PseudoLabelDataset
from training.data.photos import PhotoFile
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.self_training.config import SelfTrainingConfig
from training.self_training.pseudo_label_update import ClassMaxScores, PseudoLabelUpdater
from training.self_training.rounds import TEACHER_FILE, TeacherInfo, read_teacher_info, relabel
from training.self_training.tta_merge import MergedPredictions, TeacherPredictions, TtaConsistency
from training.train import train

CONFIG = SelfTrainingConfig(min_relative_score=0.9)


@pytest.fixture(scope="module")
def sharp_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The tiny run with sharper masks: after four steps no mask is above the threshold."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("sharp") / "run"))
    weights = load_file(run / "decoder.safetensors")
    scaled = {name: 50.0 * tensor for name, tensor in weights.items() if name.startswith("mask_head.2.")}
    save_file({**weights, **scaled}, run / "decoder.safetensors")
    return run


@pytest.fixture(scope="module")
def relabeled(
    tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset, sharp_run: Path
) -> PseudoLabelDataset:
    """The photos of the tiny dataset with labels of the sharp run; read-only."""
    out = PseudoLabelDataset(tmp_path_factory.mktemp("relabeled") / "labels")
    report = relabel(sharp_run, tiny_store, tiny_store.features, out, CONFIG)
    assert (report.round, report.photos, report.previous_consistency, report.is_accepted) == (1, 8, None, True)
    assert report.instances > 0
    return out


def read_teacher(dataset: PseudoLabelDataset) -> TeacherInfo:
    info = read_teacher_info(dataset)
    assert info is not None
    return info


def test_a_network_can_be_trained_on_the_new_labels(
    tmp_path: Path, tiny_store: PseudoLabelDataset, relabeled: PseudoLabelDataset
) -> None:
    assert [each.digest for each in relabeled.read_photos()] == [each.digest for each in tiny_store.read_photos()]
    masks = [mask for masks in relabeled.read_instances().values() for mask in masks]
    assert all(0.0 < mask["score"] <= 1.0 for mask in masks)
    config = replace(MASK_TRANSFORMER_PRESETS["tiny"], target_source="instances", droploss=True)
    assert train(relabeled, tiny_store.features, tmp_path / "run", config).step == 4


def test_the_new_labels_name_their_teacher(tiny_store: PseudoLabelDataset, relabeled: PseudoLabelDataset) -> None:
    info = read_teacher(relabeled)
    assert (info.round, info.min_relative_score) == (1, 0.9)
    assert relabeled.read_config().teacher_hash.startswith(info.weights_sha256)
    assert read_teacher_info(tiny_store) is None


def test_an_interrupted_round_continues_to_the_same_labels(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    interrupted = PseudoLabelDataset(Path(shutil.copytree(relabeled.folder, tmp_path / "labels")))
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        (interrupted.folder / name).unlink()
    shutil.rmtree(interrupted.chunks_dir)
    for path in list((interrupted.folder / "teacher-predictions").iterdir())[:3]:
        path.unlink()
    relabel(sharp_run, tiny_store, tiny_store.features, interrupted, CONFIG)
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        assert (interrupted.folder / name).read_text() == (relabeled.folder / name).read_text()


def copy_with(dataset: PseudoLabelDataset, folder: Path, flip: float) -> PseudoLabelDataset:
    """A copy of the dataset whose teacher has another consistency."""
    copy = PseudoLabelDataset(Path(shutil.copytree(dataset.folder, folder)))
    content = json.loads((copy.folder / TEACHER_FILE).read_text())
    content["consistency"]["flip"] = flip
    (copy.folder / TEACHER_FILE).write_text(json.dumps(content))
    return copy


def test_a_run_less_consistent_than_its_teacher_is_rejected_unless_forced(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    dataset = copy_with(relabeled, tmp_path / "consistent", flip=1.1)
    out = PseudoLabelDataset(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"less consistent than the previous teacher \(flip 1\.100 to 0\.\d+\)"):
        relabel(sharp_run, dataset, tiny_store.features, out, CONFIG)
    with pytest.raises(DatasetError):
        out.read_photos()
    forced = relabel(sharp_run, dataset, tiny_store.features, out, replace(CONFIG, force=True))
    assert (forced.round, forced.is_accepted) == (2, False)
    assert len(out.read_photos()) == 8


def test_multi_crop_changes_the_labels_but_not_the_consistency(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    out, config = PseudoLabelDataset(tmp_path / "out"), replace(CONFIG, multi_crop=True)
    report = relabel(sharp_run, tiny_store, tiny_store.features, out, config)
    consistency = read_teacher(out).consistency
    assert asdict(consistency) == pytest.approx(asdict(read_teacher(relabeled).consistency), nan_ok=True)
    assert report.consistency == consistency
    assert (out.folder / "instances.json").read_bytes() != (relabeled.folder / "instances.json").read_bytes()
    with pytest.raises(ConfigError, match="teacher_hash"):
        relabel(sharp_run, tiny_store, tiny_store.features, out, CONFIG)


def test_later_rounds_need_higher_scores(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    dataset, out = copy_with(relabeled, tmp_path / "labels", flip=0.0), PseudoLabelDataset(tmp_path / "out")
    report = relabel(sharp_run, dataset, tiny_store.features, out, CONFIG)
    assert report.previous_consistency is not None
    assert (report.round, report.is_accepted, report.previous_consistency.flip) == (2, True, 0.0)
    info = read_teacher(out)
    assert info.min_relative_score == pytest.approx(0.95)
    assert asdict(info.consistency) == pytest.approx(asdict(report.consistency), nan_ok=True)


def test_without_out_the_consistency_is_measured_only(
    tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    report = relabel(sharp_run, relabeled, tiny_store.features, None, CONFIG)
    assert (report.photos, report.instances) == (0, 0)
    assert np.isclose(report.consistency.flip, read_teacher(relabeled).consistency.flip, atol=1e-6)


def test_a_run_with_other_clusters_than_the_labels_is_rejected(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path
) -> None:
    dataset = PseudoLabelDataset(Path(shutil.copytree(tiny_store.folder, tmp_path / "labels")))
    content = json.loads((dataset.folder / "label.json").read_text())
    (dataset.folder / "label.json").write_text(json.dumps({**content, "thing_clusters": 7}))
    with pytest.raises(ConfigError, match="differ in thing clusters"):
        relabel(sharp_run, dataset, dataset.features, PseudoLabelDataset(tmp_path / "out"), CONFIG)


def test_a_teacher_file_of_another_version_is_rejected(tmp_path: Path) -> None:
    (tmp_path / TEACHER_FILE).write_text('{"round": 1, "steadiness": {}}')
    with pytest.raises(DatasetError, match="format version None, expected 2: run `useg self-train` again"):
        read_teacher_info(PseudoLabelDataset(tmp_path))


# Labels of one photo

SIDE, MAP_SIDE = 32, 8
PHOTO = PhotoFile(path=Path("a"), name="a", digest="a", height=SIDE, width=SIDE)


def make_predictions(scores: list[float], clusters: list[int]) -> MergedPredictions:
    """Instances of one map row each; stuff 1 from row 4 on, of probability 0.9, but 0.3 in the last row."""
    mask_probs = np.zeros((len(scores), MAP_SIDE, MAP_SIDE), np.float32)
    for row, mask in enumerate(mask_probs):
        mask[row] = 1.0
    semantic = np.zeros((MAP_SIDE, MAP_SIDE), np.int16)
    semantic[4:] = 1
    semantic_probs = np.full((MAP_SIDE, MAP_SIDE), 0.9, np.float32)
    semantic_probs[7] = 0.3
    return MergedPredictions(
        mask_probs=mask_probs,
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        semantic=semantic,
        semantic_probs=semantic_probs,
    )


def draw_rows(first: int, end: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[first:end] = 1
    return mask


def make_updater(merged: MergedPredictions, old: list[dict[str, Any]]) -> PseudoLabelUpdater:
    consistency = TtaConsistency(flip=1.0, scale=1.0, coverage=1.0)
    predictions = TeacherPredictions(merged=merged, consistency=consistency, height=SIDE, width=SIDE)
    return PseudoLabelUpdater(
        read=lambda _photo: predictions,
        old_instances={"a": old},
        max_scores=ClassMaxScores.compute([merged], thing_clusters=3, stuff_clusters=2),
        min_relative_score=0.5,
        side_px=SIDE,
        thing_clusters=3,
    )


def test_all_instances_are_labels_and_those_of_high_relative_score_are_in_the_panoptic_map() -> None:
    merged = make_predictions([0.8, 0.5, 0.3, 0.2], [1, 1, 1, 2])
    updater = make_updater(merged, [])
    label = updater.make_label(PHOTO)
    assert label.things == [1, 1, 1, 2]
    assert label.scores == pytest.approx([0.8, 0.5, 0.3, 0.2])
    assert label.masks.any((2,)).argmax(1).tolist() == [0, 4, 8, 12]
    assert label.is_in_panoptic == [True, True, False, True]  # 0.3 is less than half of 0.8
    assert sorted(label.panoptic.categories.values()) == [1, 1, 2, 4]
    assert updater.count_confident(merged) == 3


def test_old_masks_are_kept_if_no_prediction_matches_them() -> None:
    old = [
        annotate(draw_rows(0, 6), 3, score=0.4),  # IoU 4 / 6 with the prediction
        annotate(draw_rows(0, 16), 3, score=0.25, in_panoptic=0),  # 4 / 16
        annotate(draw_rows(8, 12), 2),
    ]
    label = make_updater(make_predictions([0.8], [1]), old).make_label(PHOTO)
    assert label.things == [1, 3, 2]
    assert label.scores == pytest.approx([0.8, 0.25 * 0.25, 0.25])
    assert label.is_in_panoptic == [True, False, True]
    segments = label.panoptic.categories
    assert segments[int(label.panoptic.label_map[0, 0])] == 1
    assert segments[int(label.panoptic.label_map[9, 0])] == 2
    assert label.panoptic.label_map[5, 0] == 0  # the mask that was not in the panoptic map


def test_stuff_below_half_of_its_maximum_probability_is_void() -> None:
    label = make_updater(make_predictions([], []), []).make_label(PHOTO)
    assert set(label.panoptic.categories.values()) == {4}
    rows = label.panoptic.label_map[:, 0] > 0
    assert rows.tolist() == [False] * 16 + [True] * 12 + [False] * 4
    assert label.masks.shape == (0, SIDE, SIDE)
