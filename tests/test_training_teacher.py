"""The teacher's predictions for the views of a photo, and their merge."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import SHAPE, SIDE_PX
from torch.nn import functional

from model.images import read_image
from model.networks.mask_transformer import DecoderConfig, DecoderOutput, MaskDecoder
from model.networks.vit import VisionTransformer
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache, compute_features
from training.mask_transformer.crops import full_view
from training.self_training.teacher import (
    MIN_SCORE,
    DecoderInput,
    ViewPredictions,
    make_tta_views,
    predict_views,
    run_decoder,
)
from training.self_training.tta_merge import TtaConsistency, measure_consistency, merge_views

GRID, MAP_SIDE = 4, 14


def write_photo(folder: Path, height: int, width: int) -> LabeledPhoto:
    """A photo of noise with features of noise."""
    generator = np.random.default_rng(0)
    path = folder / "a.png"
    cv2.imwrite(str(path), generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    FeatureCache(folder).write("a", generator.normal(size=(4, GRID, GRID, 64)).astype(np.float16))
    return LabeledPhoto(path=path, digest="a", label=folder / "none.png", categories={})


def make_decoder() -> MaskDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(side_px=SIDE_PX, thing_clusters=3, stuff_clusters=2, num_queries=6, num_layers=1)
    return MaskDecoder(config, SHAPE).requires_grad_(False).eval()


def test_crops_together_cover_the_photo_and_are_aligned_to_map_pixels() -> None:
    views = make_tta_views(full_view(56, 56, SIDE_PX), GRID)
    assert [each.is_mirrored for each in views] == [False, True, False, False, False, False]
    count = np.zeros((MAP_SIDE, MAP_SIDE), int)
    for view in views[2:]:
        count[view.map_region] += 1
    assert (count == 1).all()  # crops have two of four patches, the smallest aligned step


@pytest.mark.parametrize(
    ("crop_side", "expected"),
    [(0.75, [(0, 0, 84), (0, 28, 84)]), (0.5625, [(0, 0, 63), (0, 49, 63), (21, 0, 84), (21, 49, 84)])],
)
def test_a_photo_of_4_to_3_has_two_crops_or_four_smaller_ones(
    crop_side: float, expected: list[tuple[int, int, int]]
) -> None:
    views = make_tta_views(full_view(336, 448, 448), 32, crop_side)
    regions = [each.map_region for each in views[2:]]
    assert [(rows.start, columns.start, rows.stop) for rows, columns in regions] == expected


def test_with_multi_crop_the_encoder_runs_on_crops_only(tmp_path: Path) -> None:
    photo, cache = write_photo(tmp_path, 56, 56), FeatureCache(tmp_path)
    torch.manual_seed(1)
    encoder = VisionTransformer(SHAPE).eval()
    _, resampled = predict_views(make_decoder(), photo, cache)
    _, encoded = predict_views(make_decoder(), photo, cache, encoder)
    assert len(encoded) == len(resampled) == 6
    for before, after in zip(resampled[:2], encoded[:2], strict=True):
        np.testing.assert_allclose(before.semantic_probs, after.semantic_probs, atol=1e-5)  # float32, other batch
    view = make_tta_views(full_view(56, 56, SIDE_PX), GRID)[3]
    pixels = view.crop.crop_image(read_image(photo.path).image)
    (features,) = compute_features(encoder, torch.from_numpy(pixels[None]))
    output = run_decoder(make_decoder(), [DecoderInput(features=features, pixels=pixels)])
    expected = functional.adaptive_avg_pool2d(output.semantic_logits[0].softmax(0), 7).numpy()
    np.testing.assert_allclose(encoded[3].semantic_probs[(slice(None), *view.map_region)], expected, atol=1e-5)
    assert np.abs(resampled[3].semantic_probs - encoded[3].semantic_probs).max() > 0.01


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
    _, views = predict_views(decoder, write_photo(tmp_path, 56, 56), FeatureCache(tmp_path))
    assert views[0].masks[:2].sum((1, 2)).tolist() == [20, 10]
    assert views[0].scores[0] == views[0].scores[1]
    assert {int(each) for each in views[0].masks.sum((1, 2))} == {20, 10}


def test_all_views_are_in_map_pixels_of_the_whole_photo(tmp_path: Path) -> None:
    whole, views = predict_views(make_decoder(), write_photo(tmp_path, 28, 56), FeatureCache(tmp_path))
    assert whole.letterbox.size == (28, 56)
    assert len(views) == 4  # whole, mirrored and two crops
    is_photo = np.zeros((MAP_SIDE, MAP_SIDE), bool)
    is_photo[:7] = True
    columns = np.arange(MAP_SIDE)
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
    _, views = predict_views(make_decoder(), photo, cache)
    image = cv2.imread(str(photo.path))
    assert image is not None
    cv2.imwrite(str(photo.path), np.ascontiguousarray(image[:, ::-1]))
    cache.write("a", np.array(cache.read("a"))[:, :, ::-1].copy())
    _, mirrored = predict_views(make_decoder(), photo, cache)
    np.testing.assert_allclose(views[1].semantic_probs, mirrored[0].semantic_probs[:, :, ::-1], atol=1e-5)  # float32
    np.testing.assert_allclose(views[1].mask_probs, mirrored[0].mask_probs[:, :, ::-1], atol=1e-5)


# Merging views

SIDE = 8
Box = tuple[int, int, int, int]
LEFT, LONGER, SHIFTED, RIGHT = (0, 4, 0, 4), (0, 5, 0, 4), (1, 5, 0, 4), (4, 8, 4, 8)


def make_view(
    boxes: list[Box], scores: list[float], clusters: list[int], visible: Box = (0, 8, 0, 8)
) -> ViewPredictions:
    """Instances (top, bottom, left, right) of probability 0.9 on stuff 1 of probability 0.6."""
    mask_probs = np.zeros((len(boxes), SIDE, SIDE), np.float32)
    for mask, (top, bottom, left, right) in zip(mask_probs, boxes, strict=True):
        mask[top:bottom, left:right] = 0.9
    is_visible = np.zeros((SIDE, SIDE), bool)
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


def test_a_crop_that_does_not_show_an_instance_does_not_lower_its_score() -> None:
    whole = make_view([LEFT], [0.9], [0])
    merged = merge_views([whole, whole, make_view([], [], [], visible=(4, 8, 4, 8))])
    assert merged.scores.tolist() == pytest.approx([0.9])


def test_an_instance_of_a_crop_only_has_a_lower_score() -> None:
    merged = merge_views([EMPTY, EMPTY, make_view([RIGHT], [0.9], [0], visible=(3, 8, 3, 8))])
    assert merged.scores.tolist() == pytest.approx([0.8 * 0.9 * (1 + 1 / 3) / 2])


def test_an_instance_that_a_crop_cuts_off_is_dropped() -> None:
    merged = merge_views([EMPTY, EMPTY, make_view([LEFT], [0.9], [0], visible=(0, 8, 2, 8))])
    assert len(merged.scores) == 0
    assert merged.mask_probs.shape == (0, SIDE, SIDE)


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
    mean = TtaConsistency.average([consistency, TtaConsistency(flip=0.5, scale=math.nan, coverage=0.5)])
    assert (mean.flip, mean.coverage) == (0.5, 0.75)
    assert math.isnan(mean.scale)


def test_drops_beyond_the_tolerance_are_listed() -> None:
    before = TtaConsistency(flip=0.5, scale=0.5, coverage=0.5)
    after = TtaConsistency(flip=0.4, scale=0.499, coverage=math.nan)
    assert after.list_drops(before, 0.005) == ["flip 0.500 to 0.400", "coverage 0.500 to nan"]
    assert before.list_drops(after, 0.005) == []
