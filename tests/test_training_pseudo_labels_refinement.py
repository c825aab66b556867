import numpy as np
import pytest

from training.pseudo_labels.refinement import GuidedFilter, refine_masks


def draw_edge() -> np.ndarray:
    """Light up to column 218, dark from there."""
    image = np.zeros((448, 448, 3), np.uint8)
    image[:, :218] = 230
    return image


def test_a_mask_border_moves_to_the_image_edge() -> None:
    patches = np.zeros((2, 32, 32), bool)
    patches[0, :, :16] = True  # ends at pixel 224, six too far
    patches[1, :, 16:] = True
    fine = refine_masks(patches, draw_edge(), 14)
    assert set(fine[0].sum(1).tolist()) == {218}
    assert set(fine[1].sum(1).tolist()) == {448 - 218}


def test_a_mask_that_refinement_would_lose_is_empty_and_others_stay() -> None:
    patches = np.zeros((2, 32, 32), bool)
    patches[0, 5, 5] = True
    patches[1, 8:24, 8:24] = True
    fine = refine_masks(patches, np.full((448, 448, 3), 90, np.uint8), 14)
    assert [bool(mask.any()) for mask in fine] == [False, True]


def test_soft_masks_are_thresholded_at_one_half() -> None:
    soft = np.zeros((1, 32, 32), np.float32)
    soft[0, 8:24, 8:24] = 0.4
    soft[0, 8:24, 8:16] = 0.9
    fine = refine_masks(soft, np.full((448, 448, 3), 90, np.uint8), 14)[0]
    assert fine[224, 130]
    assert not fine[224, 280]


def test_the_image_may_end_inside_the_last_patch() -> None:
    fine = refine_masks(np.ones((1, 4, 3), bool), np.full((50, 40, 3), 90, np.uint8), 14)
    assert fine.shape == (1, 50, 40)
    assert fine.all()


def test_the_guided_filter_keeps_a_constant_mask() -> None:
    guide = np.random.default_rng(1).random((40, 50), dtype=np.float32)
    filtered = GuidedFilter(guide, 8).filter(np.full((40, 50), 0.7, np.float32))
    assert filtered == pytest.approx(np.full((40, 50), 0.7), abs=1e-4)
