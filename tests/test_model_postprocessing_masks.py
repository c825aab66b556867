"""Masks in their boxes come back whole, and overlap as their pixels do."""

from pathlib import Path

import numpy as np
import pytest
import reference

from model.images import resize_map
from model.postprocessing.masks import PackedMask, SoftMask, pack_mask, packed_mask_iou, paste_mask
from model.postprocessing.upsampling import BilinearUpsampler, MaskPatch


def draw(rows: slice, columns: slice) -> PackedMask:
    """A rectangle in a image of 10 x 12."""
    bits = np.zeros((10, 12), bool)
    bits[rows, columns] = True
    crop = pack_mask(bits)
    assert crop
    return crop


def test_a_crop_is_the_box_around_the_pixels() -> None:
    bits = np.zeros((5, 6), bool)
    bits[1, 2] = bits[3, 4] = True
    crop = pack_mask(bits, top=10, left=20)
    assert crop
    assert (crop.top, crop.left, crop.height, crop.width) == (11, 22, 3, 3)
    np.testing.assert_array_equal(crop.bits, bits[1:4, 2:5])
    assert crop.window == (slice(11, 14), slice(22, 25))


@pytest.mark.parametrize("bits", [np.zeros((3, 3), bool), np.zeros((0, 4), bool)])
def test_a_mask_without_a_pixel_has_no_crop(bits: np.ndarray) -> None:
    assert pack_mask(bits) is None


def test_the_overlap_is_the_share_of_the_union() -> None:
    square = draw(slice(0, 4), slice(0, 4))
    assert packed_mask_iou(square, square) == 1.0
    assert packed_mask_iou(square, draw(slice(0, 4), slice(2, 6))) == 8 / 24
    assert packed_mask_iou(square, draw(slice(0, 4), slice(4, 8))) == 0.0
    assert packed_mask_iou(draw(slice(8, 10), slice(11, 12)), square) == 0.0


def unfold(patch: SoftMask, height: int, width: int) -> np.ndarray:
    """The patch in an otherwise empty image."""
    image = np.zeros((height, width), np.float32)
    rows, columns = patch.probabilities.shape
    image[patch.top : patch.top + rows, patch.left : patch.left + columns] = patch.probabilities
    return image


def test_a_mask_is_bilinear_between_its_cells_and_fades_at_its_border() -> None:
    mask = np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)
    image = unfold(paste_mask(mask, np.array([1.0, 2.0, 5.0, 6.0]), 8, 8), 8, 8)
    # A cell is two pixels wide; pixel centers lie a quarter and three quarters of a cell from the cells' centers.
    columns = np.array([0.0, 0.0, 0.25, 0.75, 0.75, 0.25, 0.0, 0.0])
    fade = np.array([0.0, 0.25, 0.75, 1.0, 1.0, 0.75, 0.25, 0.0])
    np.testing.assert_allclose(image, fade[:, None] * columns, atol=1e-6)  # float32


def test_a_box_partly_outside_is_cut_and_not_squeezed() -> None:
    mask = np.random.default_rng(1).random((28, 28), np.float32)
    whole = unfold(paste_mask(mask, np.array([4.0, 5.0, 24.0, 25.0]), 30, 30), 30, 30)
    cut = unfold(paste_mask(mask, np.array([-6.0, -5.0, 14.0, 15.0]), 30, 12), 30, 12)
    np.testing.assert_allclose(cut[:15], whole[10:25, 10:22], atol=1e-5)  # float32
    assert not cut[16:].any()


@pytest.mark.parametrize("box", [(40.0, 2.0, 50.0, 9.0), (-9.0, 2.0, -3.0, 9.0), (2.0, 40.0, 5.0, 50.0)])
def test_a_box_outside_the_image_leaves_nothing(box: tuple[float, ...]) -> None:
    assert not paste_mask(np.ones((28, 28), np.float32), np.array(box), 20, 30).probabilities.any()


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.0, 0.0), (3.0, 3.0, 3.0, 9.0), (3.0, 9.0, 8.0, 9.0)])
def test_a_box_without_a_side_leaves_nothing(box: tuple[float, ...]) -> None:
    assert not paste_mask(np.ones((28, 28), np.float32), np.array(box), 20, 30).probabilities.any()


@pytest.mark.golden
def test_pasted_masks_are_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    height, width = (int(length) for length in units["paste_hw"])
    for mask, box, soft, binary in zip(
        units["paste_masks28"], units["paste_boxes"], units["paste_soft"], units["paste_binary"], strict=True
    ):
        image = unfold(paste_mask(mask, box, height, width), height, width)
        np.testing.assert_allclose(image, soft, rtol=0.0, atol=1e-5)  # float32
        np.testing.assert_array_equal(image >= 0.5, binary)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_masks_in_the_images_size_are_the_references(golden: Path, name: str) -> None:
    arrays = reference.read_case(golden, name).arrays
    height, width = (int(length) for length in arrays["out_hw"])
    packed = np.unpackbits(arrays["out_masks_packed"], axis=-1)[..., :width].astype(bool)
    pasted = [
        unfold(paste_mask(mask, box, height, width), height, width) >= 0.5
        for mask, box in zip(arrays["det_masks28"], arrays["out_boxes"], strict=True)
    ]
    np.testing.assert_array_equal(np.stack(pasted), packed)


ROUNDING = 1e-5
"""Two ways to interpolate float32 may part where values lie this close."""


def fill(cut: MaskPatch | None, height: int, width: int) -> np.ndarray:
    """A cut in the whole image."""
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
    enlargement = BilinearUpsampler((1, 2), (1, 8))
    (cut,) = enlargement.threshold(np.array([[[0.0, 1.0]]], np.float32), 0.5)
    assert fill(cut, 1, 8).tolist() == [[False] * 4 + [True] * 4]
    fields = np.array([[[0.0, 1.0]], [[1.0, 0.0]]], np.float32)
    assert enlargement.argmax(fields, np.array([5, 9])).tolist() == [[9] * 4 + [5] * 4]


def test_pixels_above_a_limit_are_those_of_the_enlarged_map() -> None:
    generator = np.random.default_rng(41)
    for rows, columns, height, width in draw_sizes(42, 150):
        stack = generator.random((3, rows, columns)).astype(np.float32)
        cuts = list(BilinearUpsampler((rows, columns), (height, width)).threshold(stack, 0.5))
        assert len(cuts) == 3
        for soft, cut in zip(stack, cuts, strict=True):
            whole = resize_map(soft, height, width)
            differs = fill(cut, height, width) != (whole > 0.5)
            assert np.abs(whole[differs] - 0.5).max(initial=0.0) < ROUNDING


def test_winners_are_those_of_the_enlarged_maps() -> None:
    generator = np.random.default_rng(43)
    for rows, columns, height, width in draw_sizes(44, 150):
        fields = generator.random((4, rows, columns)).astype(np.float32)
        winners = BilinearUpsampler((rows, columns), (height, width)).argmax(fields, np.arange(4, dtype=np.uint8))
        whole = np.stack([resize_map(field, height, width) for field in fields])
        first, second = np.sort(whole, axis=0)[-1:-3:-1]
        assert (first - second)[winners != whole.argmax(0)].max(initial=0.0) < ROUNDING


def test_a_field_that_wins_only_between_cells_is_found() -> None:
    # At the four centers 0 or 1 win; half way both have fallen to 0.5, and 2 stands at 0.6 everywhere.
    fields = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.6]]], np.float32)
    winners = BilinearUpsampler((1, 2), (1, 20)).argmax(fields, np.arange(3))
    assert winners[0].tolist() == [0] * 9 + [2] * 2 + [1] * 9


def test_of_equal_fields_the_first_wins() -> None:
    fields = np.ones((3, 2, 2), np.float32)
    assert np.unique(BilinearUpsampler((2, 2), (6, 6)).argmax(fields, np.array([4, 5, 6]))).tolist() == [4]


@pytest.mark.parametrize("soft", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((3, 3), 0.5)])
def test_a_map_that_nowhere_exceeds_the_limit_gives_nothing(soft: np.ndarray) -> None:
    assert list(BilinearUpsampler((3, 3), (9, 9)).threshold(soft[None].astype(np.float32), 0.5)) == [None]


def test_no_maps_give_no_cuts() -> None:
    assert list(BilinearUpsampler((3, 3), (9, 9)).threshold(np.zeros((0, 3, 3), np.float32), 0.5)) == []


def test_a_small_object_comes_in_a_small_cut() -> None:
    soft = np.zeros((1, 10, 10), np.float32)
    soft[0, 4, 4] = 1.0
    (cut,) = BilinearUpsampler((10, 10), (100, 100)).threshold(soft, 0.5)
    assert cut is not None
    assert max(cut.bits.shape) <= 20
