import numpy as np

from training.pseudo_labels.refinement import refine_masks


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


def test_the_image_may_end_inside_the_last_patch() -> None:
    fine = refine_masks(np.ones((1, 4, 3), bool), np.full((50, 40, 3), 90, np.uint8), 14)
    assert fine.shape == (1, 50, 40)
    assert fine.all()
