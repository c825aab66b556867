from pathlib import Path

import numpy as np
import pytest
import tokens

from model.errors import LabelStoreError
from training.pseudo_labels.consensus import (
    agglomerative_regions,
    consensus_masks,
    feature_contrast,
    fit_projections,
    load_projections,
    pairwise_mask_iou,
)

FIRST, SECOND = (slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))


def mark(where: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[where] = True
    return mask


def test_objects_that_all_views_see_lead_whole_and_apart() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = consensus_masks(drawn, fit_projections(drawn.reshape(-1, 8)).look(drawn))
    # Whitening makes much of noise: a patch at the rim may be lost to a view.
    overlaps = pairwise_mask_iou(np.concatenate([found.binary[:2], [mark(FIRST), mark(SECOND)]]))
    assert sorted(overlaps[:2, 2:].max(0).tolist()) == pytest.approx([1.0, 1.0], abs=0.1)
    assert (np.diff(found.scores) <= 0).all()


def test_a_mask_that_more_views_see_scores_higher_by_their_number() -> None:
    drawn = tokens.draw([FIRST])
    seen = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    blind = np.zeros((20, 20, 2), np.float32)
    blind[..., 0] = 1.0  # all one region, too large to be an object
    few, many = consensus_masks(drawn, [seen, blind, blind]), consensus_masks(drawn, [seen, seen, seen])
    assert many.scores[0] - few.scores[0] == pytest.approx(2.0, abs=1e-5)
    assert (many.binary[0] == mark(FIRST)).all()


def test_a_photo_without_any_structure_has_no_mask() -> None:
    plain = np.ones((20, 20, 8), np.float32)
    assert consensus_masks(plain, [plain, plain]).soft.shape == (0, 20, 20)


def test_no_two_results_are_one_object() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = consensus_masks(drawn, fit_projections(drawn.reshape(-1, 8)).look(drawn))
    assert ((found.soft >= 0.0) & (found.soft <= 1.0)).all()
    assert len(found.soft) == len(found.scores) >= 2


def test_overlaps_are_intersections_over_unions() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]], bool)
    expected = [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]
    assert pairwise_mask_iou(masks) == pytest.approx(np.array(expected))


def test_contrast_is_inside_less_ring_less_half_the_border() -> None:
    unit = np.zeros((8, 8, 2), np.float32)
    unit[..., 0] = 1.0
    unit[3:5, 3:5] = [0.0, 1.0]
    object_mask, half = np.zeros((2, 8, 8), bool)
    object_mask[3:5, 3:5] = True
    half[:, :4] = True
    inside_half = np.array([30.0, 2.0]) / np.hypot(30.0, 2.0)
    within = (30 * inside_half[0] + 2 * inside_half[1]) / 32
    around = (14 * inside_half[0] + 2 * inside_half[1]) / 16  # two columns of eight, two patches of them the object's
    expected = [1.0, within - around - 0.5 * 14 / 28]
    assert feature_contrast(np.stack([object_mask, half]), unit) == pytest.approx(np.array(expected), abs=1e-5)


def point(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def draw_view(rows: list[list[float]]) -> np.ndarray:
    """Unit features in a plane, by their angle in degrees."""
    return np.array([[point(angle) for angle in row] for row in rows], np.float32)


def test_neighbours_merge_once_they_are_more_alike_than_the_threshold() -> None:
    view = draw_view([[0, 0, 40, 90], [0, 0, 40, 90]])
    found = agglomerative_regions(view, [0.9, 0.7, 0.2], (2, 8))
    # cos 40 = 0.77: the middle joins the left before it joins the right (cos 50 = 0.64).
    expected = [[[1, 1, 0, 0]] * 2, [[0, 0, 1, 0]] * 2, [[0, 0, 0, 1]] * 2, [[1, 1, 1, 0]] * 2, [[1, 1, 1, 1]] * 2]
    assert sorted(found.astype(int).tolist()) == sorted(expected)


def test_alike_regions_that_do_not_touch_stay_apart() -> None:
    found = agglomerative_regions(draw_view([[0, 90, 0]] * 2), [0.5], (1, 6))
    assert [mask.sum() for mask in found] == [2, 2, 2]


def test_a_region_is_compared_by_the_mean_of_its_patches() -> None:
    """A chain of small steps ends where the mean is too far from the next patch."""
    found = agglomerative_regions(draw_view([[0, 0, 0, 0, 30, 60]]), [np.cos(np.radians(40.0))], (1, 6))
    assert sorted(found[:, 0].astype(int).tolist()) == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


def test_only_regions_of_the_asked_areas_are_given_each_once() -> None:
    view = draw_view([[0, 0, 90, 180, 180, 180]])
    found = agglomerative_regions(view, [0.9, 0.8, 0.7], (2, 2))
    assert found[:, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0]]


def test_no_region_fits_gives_an_empty_stack() -> None:
    assert agglomerative_regions(draw_view([[0, 0], [0, 0]]), [0.9], (5, 6)).shape == (0, 2, 2)


def draw_tokens() -> np.ndarray:
    """Two axes, one ten times as long as the other, and a mean far off."""
    return np.random.default_rng(0).normal(0.0, [10.0, 1.0], (4000, 2)) + np.array([100.0, 50.0])


def test_views_take_out_the_mean_and_weigh_axes_less_and_less_by_their_length() -> None:
    sample = draw_tokens()
    centred, white, half = fit_projections(sample).look(sample.mean(0) + np.array([[[10.0, 1.0]]]))
    assert np.abs(centred[0, 0]) == pytest.approx(np.array([10.0, 1.0]) / np.hypot(10, 1), abs=1e-6)
    # 4,000 draws fix a deviation to 1.1 %.
    assert np.abs(white[0, 0]) == pytest.approx(np.array([1.0, 1.0]) / np.hypot(1, 1), abs=0.03)
    root = np.sqrt(10.0)
    assert np.abs(half[0, 0]) == pytest.approx(np.array([root, 1.0]) / np.hypot(root, 1), abs=0.03)


def test_views_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    views = fit_projections(draw_tokens())
    views.write(tmp_path / "views.npz")
    again = load_projections(tmp_path / "views.npz")
    assert (again.mean == views.mean).all()
    assert (again.projection == views.projection).all()


def test_a_file_that_holds_no_views_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "views.npz", other=np.zeros(3))
    with pytest.raises(LabelStoreError, match=r"views\.npz holds no views"):
        load_projections(tmp_path / "views.npz")
