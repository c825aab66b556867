import numpy as np
import pytest
import tokens

from training.labels.clusters.views import fit_views
from training.labels.masks.vote import measure_contrast, measure_overlaps, vote

FIRST, SECOND = (slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))


def mark(where: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[where] = True
    return mask


def test_objects_that_all_views_see_lead_whole_and_apart() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = vote(drawn, fit_views(drawn.reshape(-1, 8)).look(drawn))
    # Whitening makes much of noise: a patch at the rim may be lost to a view.
    overlaps = measure_overlaps(np.concatenate([found.hard[:2], [mark(FIRST), mark(SECOND)]]))
    assert sorted(overlaps[:2, 2:].max(0).tolist()) == pytest.approx([1.0, 1.0], abs=0.1)
    assert (np.diff(found.scores) <= 0).all()


def test_a_mask_that_more_views_see_scores_higher_by_their_number() -> None:
    drawn = tokens.draw([FIRST])
    seen = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    blind = np.zeros((20, 20, 2), np.float32)
    blind[..., 0] = 1.0  # all one region, too large to be an object
    few, many = vote(drawn, [seen, blind, blind]), vote(drawn, [seen, seen, seen])
    assert many.scores[0] - few.scores[0] == pytest.approx(2.0, abs=1e-5)
    assert (many.hard[0] == mark(FIRST)).all()


def test_a_photo_without_any_structure_has_no_mask() -> None:
    plain = np.ones((20, 20, 8), np.float32)
    assert vote(plain, [plain, plain]).soft.shape == (0, 20, 20)


def test_no_two_results_are_one_object() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = vote(drawn, fit_views(drawn.reshape(-1, 8)).look(drawn))
    assert ((found.soft >= 0.0) & (found.soft <= 1.0)).all()
    assert len(found.soft) == len(found.scores) >= 2


def test_overlaps_are_intersections_over_unions() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]], bool)
    expected = [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]
    assert measure_overlaps(masks) == pytest.approx(np.array(expected))


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
    assert measure_contrast(np.stack([object_mask, half]), unit) == pytest.approx(np.array(expected), abs=1e-5)
