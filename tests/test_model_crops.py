"""Masks in their boxes come back whole, and overlap as their pixels do."""

import numpy as np
import pytest

from model.crops import Crop, measure_iou, pack_crop


def draw(rows: slice, columns: slice) -> Crop:
    """A rectangle in a picture of 10 x 12."""
    bits = np.zeros((10, 12), bool)
    bits[rows, columns] = True
    crop = pack_crop(bits)
    assert crop
    return crop


def test_a_crop_is_the_box_around_the_pixels() -> None:
    bits = np.zeros((5, 6), bool)
    bits[1, 2] = bits[3, 4] = True
    crop = pack_crop(bits, top=10, left=20)
    assert crop
    assert (crop.top, crop.left, crop.height, crop.width) == (11, 22, 3, 3)
    np.testing.assert_array_equal(crop.bits, bits[1:4, 2:5])
    assert crop.window == (slice(11, 14), slice(22, 25))


@pytest.mark.parametrize("bits", [np.zeros((3, 3), bool), np.zeros((0, 4), bool)])
def test_a_mask_without_a_pixel_has_no_crop(bits: np.ndarray) -> None:
    assert pack_crop(bits) is None


def test_the_overlap_is_the_share_of_the_union() -> None:
    square = draw(slice(0, 4), slice(0, 4))
    assert measure_iou(square, square) == 1.0
    assert measure_iou(square, draw(slice(0, 4), slice(2, 6))) == 8 / 24
    assert measure_iou(square, draw(slice(0, 4), slice(4, 8))) == 0.0
    assert measure_iou(draw(slice(8, 10), slice(11, 12)), square) == 0.0
