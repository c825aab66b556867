"""Decisions at a picture's own size equal those on the whole enlarged map."""

import numpy as np
import pytest

from model.enlargement import Cut, Enlargement
from model.pixels import resize_map

ROUNDING = 1e-5
"""Two ways to interpolate float32 may part where values lie this close."""


def fill(cut: Cut | None, height: int, width: int) -> np.ndarray:
    """A cut in the whole picture."""
    whole = np.zeros((height, width), bool)
    if cut:
        rows, columns = cut.bits.shape
        whole[cut.top : cut.top + rows, cut.left : cut.left + columns] = cut.bits
    return whole


def draw_sizes(seed: int, count: int) -> list[tuple[int, int, int, int]]:
    """Cells and pixels either way: enlarged, shrunk, and one cell or pixel thin."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(1, 14, (count, 4)) * generator.integers(1, 6, (count, 4)) ** np.array([0, 0, 1, 1])
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in drawn]


def test_a_step_between_two_cells_lies_half_way() -> None:
    enlargement = Enlargement((1, 2), (1, 8))
    (cut,) = enlargement.exceed(np.array([[[0.0, 1.0]]], np.float32), 0.5)
    assert fill(cut, 1, 8).tolist() == [[False] * 4 + [True] * 4]
    fields = np.array([[[0.0, 1.0]], [[1.0, 0.0]]], np.float32)
    assert enlargement.find_winners(fields, np.array([5, 9])).tolist() == [[9] * 4 + [5] * 4]


def test_pixels_above_a_limit_are_those_of_the_enlarged_map() -> None:
    generator = np.random.default_rng(41)
    for rows, columns, height, width in draw_sizes(42, 150):
        stack = generator.random((3, rows, columns)).astype(np.float32)
        cuts = list(Enlargement((rows, columns), (height, width)).exceed(stack, 0.5))
        assert len(cuts) == 3
        for soft, cut in zip(stack, cuts, strict=True):
            whole = resize_map(soft, height, width)
            differs = fill(cut, height, width) != (whole > 0.5)
            assert np.abs(whole[differs] - 0.5).max(initial=0.0) < ROUNDING


def test_winners_are_those_of_the_enlarged_maps() -> None:
    generator = np.random.default_rng(43)
    for rows, columns, height, width in draw_sizes(44, 150):
        fields = generator.random((4, rows, columns)).astype(np.float32)
        winners = Enlargement((rows, columns), (height, width)).find_winners(fields, np.arange(4, dtype=np.uint8))
        whole = np.stack([resize_map(field, height, width) for field in fields])
        first, second = np.sort(whole, axis=0)[-1:-3:-1]
        assert (first - second)[winners != whole.argmax(0)].max(initial=0.0) < ROUNDING


def test_a_field_that_wins_only_between_cells_is_found() -> None:
    # At the four centres 0 or 1 win; half way both have fallen to 0.5, and 2 stands at 0.6 everywhere.
    fields = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.6]]], np.float32)
    winners = Enlargement((1, 2), (1, 20)).find_winners(fields, np.arange(3))
    assert winners[0].tolist() == [0] * 9 + [2] * 2 + [1] * 9


def test_of_equal_fields_the_first_wins() -> None:
    fields = np.ones((3, 2, 2), np.float32)
    assert np.unique(Enlargement((2, 2), (6, 6)).find_winners(fields, np.array([4, 5, 6]))).tolist() == [4]


@pytest.mark.parametrize("soft", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((3, 3), 0.5)])
def test_a_map_that_nowhere_exceeds_the_limit_gives_nothing(soft: np.ndarray) -> None:
    assert list(Enlargement((3, 3), (9, 9)).exceed(soft[None].astype(np.float32), 0.5)) == [None]


def test_no_maps_give_no_cuts() -> None:
    assert list(Enlargement((3, 3), (9, 9)).exceed(np.zeros((0, 3, 3), np.float32), 0.5)) == []


def test_a_small_object_comes_in_a_small_cut() -> None:
    soft = np.zeros((1, 10, 10), np.float32)
    soft[0, 4, 4] = 1.0
    (cut,) = Enlargement((10, 10), (100, 100)).exceed(soft, 0.5)
    assert cut is not None
    assert max(cut.bits.shape) <= 20
