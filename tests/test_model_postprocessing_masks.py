"""Packed masks, pasted masks and bilinear upsampling."""

from pathlib import Path

import numpy as np
import pytest
import reference

from model.images import resize_map
from model.postprocessing.masks import BilinearUpsampler, paste_mask


def place(part: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return the part in an otherwise empty image."""
    image = np.zeros((height, width), part.dtype)
    image[top : top + part.shape[0], left : left + part.shape[1]] = part
    return image


@pytest.mark.golden
def test_pasted_masks_match_the_golden_ones(golden: Path) -> None:
    units = reference.read_units(golden)
    height, width = (int(length) for length in units["paste_hw"])
    for mask, box, values, binary in zip(
        units["paste_masks28"], units["paste_boxes"], units["paste_soft"], units["paste_binary"], strict=True
    ):
        image = place(*paste_mask(mask, box, height, width), height, width)
        np.testing.assert_allclose(image, values, rtol=0.0, atol=1e-5)  # float32
        np.testing.assert_array_equal(image >= 0.5, binary)


ROUNDING = 1e-5
"""Two implementations of float32 interpolation may differ by this much."""


def draw_sizes(seed: int, count: int) -> list[tuple[int, int, int, int]]:
    """Return sizes of maps and images: enlarged, shrunk, and one cell or pixel thin."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(1, 14, (count, 4)) * generator.integers(1, 6, (count, 4)) ** np.array([0, 0, 1, 1])
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in drawn]


def test_threshold_matches_interpolating_the_whole_map() -> None:
    generator = np.random.default_rng(41)
    for rows, columns, height, width in draw_sizes(42, 150):
        maps = generator.random((3, rows, columns)).astype(np.float32)
        patches = list(BilinearUpsampler((rows, columns), (height, width)).threshold(maps, 0.5))
        assert len(patches) == 3
        for values, patch in zip(maps, patches, strict=True):
            whole = resize_map(values, height, width)
            found = place(patch.bits, patch.top, patch.left, height, width) if patch else np.zeros_like(whole, bool)
            differs = found != (whole > 0.5)
            assert np.abs(whole[differs] - 0.5).max(initial=0.0) < ROUNDING


def test_argmax_matches_interpolating_the_whole_maps() -> None:
    generator = np.random.default_rng(43)
    for rows, columns, height, width in draw_sizes(44, 150):
        maps = generator.random((4, rows, columns)).astype(np.float32)
        winners = BilinearUpsampler((rows, columns), (height, width)).argmax(maps, np.arange(4, dtype=np.uint8))
        whole = np.stack([resize_map(values, height, width) for values in maps])
        first, second = np.sort(whole, axis=0)[-1:-3:-1]
        assert (first - second)[winners != whole.argmax(0)].max(initial=0.0) < ROUNDING


def test_a_map_that_is_highest_only_between_cells_is_found() -> None:
    # Maps 0 and 1 are highest at the cell centers; halfway both are 0.5, and map 2 is 0.6 everywhere.
    maps = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.6]]], np.float32)
    winners = BilinearUpsampler((1, 2), (1, 20)).argmax(maps, np.arange(3))
    assert winners[0].tolist() == [0] * 9 + [2] * 2 + [1] * 9
    equal = np.ones((3, 2, 2), np.float32)
    assert np.unique(BilinearUpsampler((2, 2), (6, 6)).argmax(equal, np.array([4, 5, 6]))).tolist() == [4]


def test_a_small_object_gives_a_small_patch() -> None:
    values = np.zeros((1, 10, 10), np.float32)
    values[0, 4, 4] = 1.0
    (patch,) = BilinearUpsampler((10, 10), (100, 100)).threshold(values, 0.5)
    assert patch is not None
    assert max(patch.bits.shape) <= 20
