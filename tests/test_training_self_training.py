"""Rounds of self-training: new labels, the acceptance test, resuming and plots."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from coco_reference import annotate
from safetensors.torch import load_file, save_file
from tiny import SHAPE, SIDE_PX

from model.errors import ConfigError, DatasetError, TrainingError
from model.networks.mask_transformer import DecoderConfig, DecoderOutput, MaskDecoder
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureCache
from training.data.panoptic_labels import ImageLabel
from training.data.photos import PhotoFile
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.mask_transformer.samples import full_view
from training.self_training.rounds import (
    TEACHER_FILE,
    PseudoLabelUpdater,
    compute_thresholds,
    read_teacher_info,
    relabel,
)
from training.self_training.teacher import (
    MIN_SCORE,
    TeacherPredictions,
    TtaConsistency,
    ViewPredictions,
    make_tta_views,
    measure_consistency,
    merge_views,
    predict_views,
)
from training.train import train
from training.trainer.config import RunOptions, SelfTrainingConfig

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


def test_the_new_labels_name_their_teacher_and_a_network_can_be_trained_on_them(
    tmp_path: Path, tiny_store: PseudoLabelDataset, relabeled: PseudoLabelDataset
) -> None:
    info = read_teacher_info(relabeled)
    assert info is not None
    assert (info.round, info.min_relative_score) == (1, 0.9)
    assert relabeled.read_config().teacher_hash.startswith(info.weights_sha256)
    assert read_teacher_info(tiny_store) is None
    assert [each.digest for each in relabeled.read_photos()] == [each.digest for each in tiny_store.read_photos()]
    masks = [mask for masks in relabeled.read_instances().values() for mask in masks]
    assert all(0.0 < mask["score"] <= 1.0 for mask in masks)
    config = replace(MASK_TRANSFORMER_PRESETS["tiny"], target_source="instances", droploss=True)
    assert train(relabeled, RunOptions(out=tmp_path / "run", features=tiny_store.features), config).step == 4


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


def test_a_run_less_consistent_than_its_teacher_is_rejected_unless_forced(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    dataset = PseudoLabelDataset(Path(shutil.copytree(relabeled.folder, tmp_path / "consistent")))
    content = json.loads((dataset.folder / TEACHER_FILE).read_text())
    content["consistency"]["flip"] = 1.1
    (dataset.folder / TEACHER_FILE).write_text(json.dumps(content))
    out = PseudoLabelDataset(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"less consistent than the previous teacher \(flip 1\.100 to 0\.\d+\)"):
        relabel(sharp_run, dataset, tiny_store.features, out, CONFIG)
    with pytest.raises(DatasetError):
        out.read_photos()
    forced = relabel(sharp_run, dataset, tiny_store.features, out, replace(CONFIG, force=True))
    assert (forced.round, forced.is_accepted) == (2, False)
    assert len(out.read_photos()) == 8


def test_without_out_the_consistency_is_measured_only(
    tiny_store: PseudoLabelDataset, sharp_run: Path, relabeled: PseudoLabelDataset
) -> None:
    report = relabel(sharp_run, relabeled, tiny_store.features, None, CONFIG)
    assert (report.photos, report.instances) == (0, 0)
    teacher = read_teacher_info(relabeled)
    assert teacher is not None
    assert np.isclose(report.consistency.flip, teacher.consistency.flip, atol=1e-6)


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
    with pytest.raises(DatasetError, match="format version None, this release reads 2: run `useg self-train` again"):
        read_teacher_info(PseudoLabelDataset(tmp_path))


# Labels of one photo

SIDE, MAP_SIDE = 32, 8
PHOTO = PhotoFile(path=Path("a"), name="a", digest="a", height=SIDE, width=SIDE)


def make_predictions(scores: list[float], clusters: list[int]) -> TeacherPredictions:
    """Instances of one map row each; stuff 1 from row 4 on, of probability 0.9, but 0.3 in the last row."""
    mask_probs = np.zeros((len(scores), MAP_SIDE, MAP_SIDE), np.float32)
    for row, mask in enumerate(mask_probs):
        mask[row] = 1.0
    semantic = np.zeros((MAP_SIDE, MAP_SIDE), np.int16)
    semantic[4:] = 1
    semantic_probs = np.full((MAP_SIDE, MAP_SIDE), 0.9, np.float32)
    semantic_probs[7] = 0.3
    return TeacherPredictions(
        mask_probs=mask_probs,
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        semantic=semantic,
        semantic_probs=semantic_probs,
        consistency=TtaConsistency(1.0, 1.0, 1.0),
    )


def draw_rows(first: int, end: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[first:end] = 1
    return mask


def update(predictions: TeacherPredictions, old: list[dict[str, Any]]) -> ImageLabel:
    min_scores, min_stuff_probs = compute_thresholds([predictions], 0.5, thing_clusters=3, stuff_clusters=2)
    updater = PseudoLabelUpdater(
        predict=lambda _photo: predictions,
        old_instances={"a": old},
        min_scores=min_scores,
        min_stuff_probs=min_stuff_probs,
        side_px=SIDE,
    )
    return updater.make_label(PHOTO)


def test_all_instances_are_labels_and_those_of_high_relative_score_are_in_the_panoptic_map() -> None:
    label = update(make_predictions([0.8, 0.5, 0.3, 0.2], [1, 1, 1, 2]), [])
    assert label.things == [1, 1, 1, 2]
    assert label.scores == pytest.approx([0.8, 0.5, 0.3, 0.2])
    assert label.masks.any((2,)).argmax(1).tolist() == [0, 4, 8, 12]
    assert label.is_in_panoptic == [True, True, False, True]  # 0.3 is less than half of 0.8
    assert sorted(label.panoptic.categories.values()) == [1, 1, 2, 4]


def test_old_masks_are_kept_if_no_prediction_matches_them() -> None:
    old = [
        annotate(draw_rows(0, 6), 3, score=0.4),  # IoU 4 / 6 with the prediction
        annotate(draw_rows(0, 16), 3, score=0.25, in_panoptic=0),  # 4 / 16
        annotate(draw_rows(8, 12), 2),
    ]
    label = update(make_predictions([0.8], [1]), old)
    assert label.things == [1, 3, 2]
    assert label.scores == pytest.approx([0.8, 0.25 * 0.25, 0.25])
    assert label.is_in_panoptic == [True, False, True]
    segments = label.panoptic.categories
    assert segments[int(label.panoptic.label_map[0, 0])] == 1
    assert segments[int(label.panoptic.label_map[9, 0])] == 2
    assert label.panoptic.label_map[5, 0] == 0  # the mask that was not in the panoptic map


def test_stuff_below_half_of_its_maximum_probability_is_void() -> None:
    label = update(make_predictions([], []), [])
    assert set(label.panoptic.categories.values()) == {4}
    rows = label.panoptic.label_map[:, 0] > 0
    assert rows.tolist() == [False] * 16 + [True] * 12 + [False] * 4
    assert label.masks.shape == (0, SIDE, SIDE)


GRID, TINY_MAP_SIDE = 4, 14


def write_photo(folder: Path, height: int, width: int) -> PhotoFile:
    """A photo of noise with features of noise."""
    generator = np.random.default_rng(0)
    path = folder / "a.png"
    cv2.imwrite(str(path), generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    FeatureCache(folder).write("a", generator.normal(size=(4, GRID, GRID, 64)).astype(np.float16))
    return PhotoFile(path=path, name="a", digest="a", height=height, width=width)


def make_decoder() -> MaskDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, num_queries=6, num_layers=1)
    return MaskDecoder(config, SHAPE).requires_grad_(False).eval()


def test_crops_together_cover_the_photo_and_are_aligned_to_map_pixels() -> None:
    views = make_tta_views(full_view(56, 56, SIDE_PX, GRID))
    assert [each.is_mirrored for each in views] == [False, True, False, False, False, False]
    count = np.zeros((TINY_MAP_SIDE, TINY_MAP_SIDE), int)
    for view in views[2:]:
        rows, columns = (slice(7 * first // 2, 7 * (first + view.side) // 2) for first in (view.top, view.left))
        count[rows, columns] += 1
    assert (count == 1).all()  # crops have two of four patches, the smallest aligned step


def test_each_connected_component_of_a_mask_is_an_instance(tmp_path: Path) -> None:
    """Every query of the decoder has a bar, one of half the length next to it, and a dot."""
    decoder = make_decoder()

    def replace_masks(output: DecoderOutput) -> DecoderOutput:
        masks = torch.full_like(output.mask_logits, -9.0)
        masks[:, :, 1:3, 1:11] = masks[:, :, 5:7, 1:6] = masks[:, :, 10, 10] = 9.0
        semantic = torch.zeros_like(output.semantic_logits)
        semantic[:, 0] = 9.0
        return output._replace(mask_logits=masks, semantic_logits=semantic)

    decoder.register_forward_hook(lambda _module, _inputs, output: replace_masks(output))
    views = predict_views(decoder, write_photo(tmp_path, 56, 56), FeatureCache(tmp_path))
    assert views[0].masks[:2].sum((1, 2)).tolist() == [20, 10]
    assert views[0].scores[0] == views[0].scores[1]
    assert {int(each) for each in views[0].masks.sum((1, 2))} == {20, 10}


def test_all_views_are_in_map_pixels_of_the_whole_photo(tmp_path: Path) -> None:
    views = predict_views(make_decoder(), write_photo(tmp_path, 28, 56), FeatureCache(tmp_path))
    assert len(views) == 4  # whole, mirrored and two crops
    is_photo = np.zeros((TINY_MAP_SIDE, TINY_MAP_SIDE), bool)
    is_photo[:7] = True
    columns = np.arange(TINY_MAP_SIDE)
    assert (views[0].is_visible == is_photo).all()
    assert (views[2].is_visible == is_photo & (columns < 6)).all()  # the last of seven columns is at the border
    assert (views[3].is_visible == is_photo & (columns > 7)).all()
    assert sum(len(each.scores) for each in views) > 0
    for each in views:
        assert not each.mask_probs[:, 7:].any()
        assert each.semantic_probs.sum(0)[each.is_visible].min() > 0.99
        assert each.cluster_probs.shape == (len(each.scores), 3)
        assert (each.scores >= MIN_SCORE).all()
    assert not views[2].mask_probs[:, :, 7:].any()


def test_the_mirrored_view_is_the_whole_view_of_the_mirrored_photo(tmp_path: Path) -> None:
    photo, cache = write_photo(tmp_path, 56, 56), FeatureCache(tmp_path)
    views = predict_views(make_decoder(), photo, cache)
    image = cv2.imread(str(photo.path))
    assert image is not None
    cv2.imwrite(str(photo.path), np.ascontiguousarray(image[:, ::-1]))
    cache.write("a", np.array(cache.read("a"))[:, :, ::-1].copy())
    mirrored = predict_views(make_decoder(), photo, cache)
    np.testing.assert_allclose(views[1].semantic_probs, mirrored[0].semantic_probs[:, :, ::-1], atol=1e-5)  # float32
    np.testing.assert_allclose(views[1].mask_probs, mirrored[0].mask_probs[:, :, ::-1], atol=1e-5)


# Merging views

VIEW_SIDE = 8
Box = tuple[int, int, int, int]
LEFT, LONGER, SHIFTED, RIGHT = (0, 4, 0, 4), (0, 5, 0, 4), (1, 5, 0, 4), (4, 8, 4, 8)


def make_view(
    boxes: list[Box], scores: list[float], clusters: list[int], visible: Box = (0, 8, 0, 8)
) -> ViewPredictions:
    """Instances (top, bottom, left, right) of probability 0.9 on stuff 1 of probability 0.6."""
    mask_probs = np.zeros((len(boxes), VIEW_SIDE, VIEW_SIDE), np.float32)
    for mask, (top, bottom, left, right) in zip(mask_probs, boxes, strict=True):
        mask[top:bottom, left:right] = 0.9
    is_visible = np.zeros((VIEW_SIDE, VIEW_SIDE), bool)
    is_visible[visible[0] : visible[1], visible[2] : visible[3]] = True
    return ViewPredictions(
        mask_probs=mask_probs,
        scores=np.array(scores, np.float32),
        cluster_probs=np.eye(3, dtype=np.float32)[clusters] * 0.8 + 0.1,
        semantic_probs=np.stack([0.4 * is_visible, 0.6 * is_visible, 0 * is_visible]).astype(np.float32),
        is_visible=is_visible,
    )


EMPTY = make_view([], [], [])


def test_an_instance_of_several_views_is_their_mean_weighted_by_score() -> None:
    merged = merge_views([make_view([LEFT], [0.75], [1]), make_view([LONGER], [0.25], [2])])
    assert merged.scores.tolist() == [0.75]
    assert merged.clusters.tolist() == [2]
    assert merged.mask_probs[0, :6, 0].tolist() == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.225, 0.0])


def test_an_instance_that_only_one_of_two_views_finds_has_a_lower_score() -> None:
    merged = merge_views([make_view([LEFT, RIGHT], [0.8, 0.7], [0, 2]), make_view([RIGHT], [0.5], [2])])
    assert merged.scores.tolist() == pytest.approx([0.7, 0.6])  # three quarters of 0.8
    assert merged.clusters.tolist() == [3, 1]


def test_an_instance_of_a_crop_only_has_a_lower_score_and_one_that_it_cuts_off_is_dropped() -> None:
    merged = merge_views([EMPTY, EMPTY, make_view([RIGHT], [0.9], [0], visible=(3, 8, 3, 8))])
    assert merged.scores.tolist() == pytest.approx([0.8 * 0.9 * (1 + 1 / 3) / 2])
    merged = merge_views([EMPTY, EMPTY, make_view([LEFT], [0.9], [0], visible=(0, 8, 2, 8))])
    assert merged.mask_probs.shape == (0, VIEW_SIDE, VIEW_SIDE)


def test_duplicates_are_removed_and_overlapping_instances_decay() -> None:
    merged = merge_views([make_view([LEFT, LONGER, RIGHT], [0.4, 0.8, 0.6], [0, 1, 2])])
    assert merged.scores.tolist() == pytest.approx([0.8, 0.6])
    assert merged.clusters.tolist() == [2, 3]
    overlapping = merge_views([make_view([LEFT, SHIFTED], [0.4, 0.8], [0, 1])])  # IoU 12 / 20
    assert overlapping.scores.tolist() == pytest.approx([0.8, 0.4 * math.exp(-2.0 * 0.6**2)])


def test_semantic_probabilities_are_means_over_the_views_that_show_a_pixel() -> None:
    crop = replace(EMPTY, semantic_probs=np.zeros_like(EMPTY.semantic_probs))
    crop.semantic_probs[0, :, :4] = 1.0
    merged = merge_views([EMPTY, crop])
    assert merged.semantic[0].tolist() == [0] * 4 + [1] * 4
    assert merged.semantic_probs[0].tolist() == pytest.approx([0.7] * 4 + [0.6] * 4)


# Consistency


def test_consistency_by_hand() -> None:
    whole = make_view([LEFT, RIGHT], [0.6, 0.2], [0, 0])
    whole.semantic_probs[:] = np.array([1.0, 0.0, 0.0])[:, None, None]
    mirrored = make_view([SHIFTED, RIGHT], [0.9, 0.05], [0, 0])  # IoU 12 / 20; a score too low to count
    crop = make_view([RIGHT], [0.3], [0], visible=(4, 8, 4, 8))
    consistency = measure_consistency([whole, mirrored, crop])
    assert consistency.flip == pytest.approx(0.6 * 0.6 / 0.8)
    assert consistency.scale == pytest.approx(1.0)  # of the instance in the crop
    assert consistency.coverage == pytest.approx(16 / 64)


def test_without_instances_only_the_coverage_is_known_and_means_skip_unknown_values() -> None:
    consistency = measure_consistency([EMPTY, make_view([LEFT], [0.9], [0]), EMPTY])
    assert math.isnan(consistency.flip)
    assert consistency.coverage == 1.0
    mean = TtaConsistency.average([consistency, TtaConsistency(0.5, math.nan, 0.5)])
    assert (mean.flip, mean.coverage) == (0.5, 0.75)
    assert math.isnan(mean.scale)
