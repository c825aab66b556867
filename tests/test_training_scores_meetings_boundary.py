import numpy as np
import pytest

from training.scores.meetings.boundary import measure_boundary


def mark(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((300, 400), bool)  # diagonal 500: near is 3.75, rounded up 4 pixels
    mask[top:bottom, left:right] = True
    return mask


def test_outlines_within_the_tolerance_agree_wholly() -> None:
    assert measure_boundary(mark(100, 100, 200, 200), mark(104, 100, 204, 200)) == 1.0


def test_an_edge_one_pixel_too_far_off_costs_its_share() -> None:
    # The right edge of either, without what lies near the other's top and bottom, is missed: 100 - 2 * 4 of 396 pixels
    # of the smaller; of the larger as many, of 406.
    found, true = mark(100, 100, 200, 200), mark(100, 100, 200, 205)
    precision, recall = 1 - 92 / 396, 1 - 94 / 406
    value = 2 * precision * recall / (precision + recall)
    assert measure_boundary(found, true) == pytest.approx(value, abs=0.01)


def test_masks_far_apart_share_no_outline() -> None:
    assert measure_boundary(mark(10, 10, 50, 50), mark(100, 100, 200, 200)) == 0.0


def test_the_edge_of_the_picture_is_no_outline() -> None:
    # One outline is the right edge, 300 pixels; the other half of it and 199 pixels across. 154 of either are near.
    precision, recall = 154 / 300, 154 / 349
    value = 2 * precision * recall / (precision + recall)
    assert measure_boundary(mark(0, 0, 300, 200), mark(0, 0, 150, 200)) == pytest.approx(value)
    assert measure_boundary(mark(0, 0, 300, 400), mark(0, 0, 300, 400)) == 0.0
