from pathlib import Path

import numpy as np
import pytest
import tokens

from model.embeddings import fit_whitening
from model.errors import DatasetError
from training.pseudo_labels.consensus import (
    FeatureProjections,
    agglomerative_regions,
    consensus_masks,
    feature_contrast,
    load_projections,
    pairwise_mask_iou,
)

FIRST, SECOND = (slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))


def fit_projections(sample: np.ndarray) -> FeatureProjections:
    mean, projection = fit_whitening(sample, sample.shape[1])
    return FeatureProjections(mean=mean, projection=projection)


def mark(where: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[where] = True
    return mask


def test_objects_in_all_projections_come_first_and_are_separate() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = consensus_masks(drawn, fit_projections(drawn.reshape(-1, 8)).transform(drawn))
    # Whitening amplifies noise: a patch at the border may be missing in a projection.
    masks = np.concatenate([found.binary[:2], [mark(FIRST), mark(SECOND)]])
    ious = pairwise_mask_iou(masks, masks)
    assert sorted(ious[:2, 2:].max(0).tolist()) == pytest.approx([1.0, 1.0], abs=0.1)
    assert (np.diff(found.scores) <= 0).all()


def test_each_projection_that_has_a_mask_adds_one_to_its_score() -> None:
    drawn = tokens.draw([FIRST])
    with_object = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    blind = np.zeros((20, 20, 2), np.float32)
    blind[..., 0] = 1.0  # all one region, too large to be an object
    few, many = (
        consensus_masks(drawn, [with_object, blind, blind]),
        consensus_masks(drawn, [with_object, with_object, with_object]),
    )
    assert many.scores[0] - few.scores[0] == pytest.approx(2.0, abs=1e-5)
    assert (many.binary[0] == mark(FIRST)).all()


def test_a_photo_without_structure_has_no_mask() -> None:
    plain = np.ones((20, 20, 8), np.float32)
    assert consensus_masks(plain, [plain, plain]).soft.shape == (0, 20, 20)


def test_pairwise_iou_is_intersection_over_union() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]], bool)
    expected = [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]
    assert pairwise_mask_iou(masks, masks) == pytest.approx(np.array(expected))


def test_contrast_is_inside_minus_ring_minus_half_the_border() -> None:
    unit = np.zeros((8, 8, 2), np.float32)
    unit[..., 0] = 1.0
    unit[3:5, 3:5] = [0.0, 1.0]
    object_mask, half = np.zeros((2, 8, 8), bool)
    object_mask[3:5, 3:5] = True
    half[:, :4] = True
    inside_half = np.array([30.0, 2.0]) / np.hypot(30.0, 2.0)
    within = (30 * inside_half[0] + 2 * inside_half[1]) / 32
    around = (14 * inside_half[0] + 2 * inside_half[1]) / 16  # two columns of eight, two patches of them in the object
    expected = [1.0, within - around - 0.5 * 14 / 28]
    assert feature_contrast(np.stack([object_mask, half]), unit) == pytest.approx(np.array(expected), abs=1e-5)


def point(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def draw_features(rows: list[list[float]]) -> np.ndarray:
    """Unit features in a plane, by their angle in degrees."""
    return np.array([[point(angle) for angle in row] for row in rows], np.float32)


def test_neighbors_merge_above_the_threshold_most_similar_first() -> None:
    features = draw_features([[0, 0, 40, 90], [0, 0, 40, 90]])
    found = agglomerative_regions(features, [0.9, 0.7, 0.2], (2, 8))
    # cos 40 = 0.77: the middle joins the left before it joins the right (cos 50 = 0.64).
    expected = [[[1, 1, 0, 0]] * 2, [[0, 0, 1, 0]] * 2, [[0, 0, 0, 1]] * 2, [[1, 1, 1, 0]] * 2, [[1, 1, 1, 1]] * 2]
    assert sorted(found.astype(int).tolist()) == sorted(expected)


def test_regions_are_compared_by_the_mean_of_their_patches() -> None:
    """A chain of small steps ends where the mean differs too much from the next patch."""
    found = agglomerative_regions(draw_features([[0, 0, 0, 0, 30, 60]]), [np.cos(np.radians(40.0))], (1, 6))
    assert sorted(found[:, 0].astype(int).tolist()) == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


def test_only_regions_within_the_areas_are_returned_each_once() -> None:
    features = draw_features([[0, 0, 90, 180, 180, 180]])
    found = agglomerative_regions(features, [0.9, 0.8, 0.7], (2, 2))
    assert found[:, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0]]


def draw_tokens() -> np.ndarray:
    """Two axes, one with ten times the deviation of the other, and a large mean."""
    return np.random.default_rng(0).normal(0.0, [10.0, 1.0], (4000, 2)) + np.array([100.0, 50.0])


def test_projections_center_whiten_and_half_whiten() -> None:
    sample = draw_tokens()
    centered, white, half = fit_projections(sample).transform(sample.mean(0) + np.array([[[10.0, 1.0]]]))
    assert np.abs(centered[0, 0]) == pytest.approx(np.array([10.0, 1.0]) / np.hypot(10, 1), abs=1e-6)
    # 4,000 samples determine a deviation to 1.1 %.
    assert np.abs(white[0, 0]) == pytest.approx(np.array([1.0, 1.0]) / np.hypot(1, 1), abs=0.03)
    root = np.sqrt(10.0)
    assert np.abs(half[0, 0]) == pytest.approx(np.array([root, 1.0]) / np.hypot(root, 1), abs=0.03)


def test_projections_round_trip_to_disk(tmp_path: Path) -> None:
    projections = fit_projections(draw_tokens())
    projections.write(tmp_path / "projections.npz")
    loaded = load_projections(tmp_path / "projections.npz")
    assert (loaded.mean == projections.mean).all()
    assert (loaded.projection == projections.projection).all()


def test_a_file_without_projections_is_named_in_the_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "projections.npz", other=np.zeros(3))
    with pytest.raises(DatasetError, match=r"projections\.npz holds no feature projections"):
        load_projections(tmp_path / "projections.npz")
