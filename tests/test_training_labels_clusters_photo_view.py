from pathlib import Path

import numpy as np

from model.contract import Canvas
from model.pixels import plan_placement
from training.labels.clusters.photo_view import PhotoView
from training.photos import PhotoFile


def make_view() -> PhotoView:
    """A photo of 28 by 56 px on a square of 56 px: two rows of four patches show it."""
    photo = PhotoFile(path=Path("a.png"), name="a.png", digest="a", height=28, width=56)
    placement = plan_placement(28, 56, [Canvas.square(56)], 4)
    return PhotoView(photo=photo, placement=placement, maps=np.zeros((4, 4, 4, 1), np.float16))


def test_a_mask_covers_patches_by_half_and_a_small_one_the_patch_that_it_lies_on() -> None:
    large = np.zeros((28, 56), bool)
    large[:, :35] = True  # two patches and a half
    assert make_view().cover(large).tolist() == [[True, True, True, False]] * 2
    small = np.zeros((28, 56), bool)
    small[20:24, 44:47] = True
    assert np.argwhere(make_view().cover(small)).tolist() == [[1, 3]]
