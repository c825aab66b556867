"""Masks lie over their boxes as drawn by hand, and as detectron2 lays them."""

from pathlib import Path

import numpy as np
import pytest
import reference

from model.paste import Patch, paste


def unfold(patch: Patch, height: int, width: int) -> np.ndarray:
    """The patch in an otherwise empty picture."""
    picture = np.zeros((height, width), np.float32)
    rows, columns = patch.soft.shape
    picture[patch.top : patch.top + rows, patch.left : patch.left + columns] = patch.soft
    return picture


def test_a_mask_is_bilinear_between_its_cells_and_fades_at_its_border() -> None:
    mask = np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)
    picture = unfold(paste(mask, np.array([1.0, 2.0, 5.0, 6.0]), 8, 8), 8, 8)
    # A cell is two pixels wide; pixel centres lie a quarter and three quarters of a cell from the cells' centres.
    columns = np.array([0.0, 0.0, 0.25, 0.75, 0.75, 0.25, 0.0, 0.0])
    fade = np.array([0.0, 0.25, 0.75, 1.0, 1.0, 0.75, 0.25, 0.0])
    np.testing.assert_allclose(picture, fade[:, None] * columns, atol=1e-6)  # float32


def test_a_box_partly_outside_is_cut_and_not_squeezed() -> None:
    mask = np.random.default_rng(1).random((28, 28), np.float32)
    whole = unfold(paste(mask, np.array([4.0, 5.0, 24.0, 25.0]), 30, 30), 30, 30)
    cut = unfold(paste(mask, np.array([-6.0, -5.0, 14.0, 15.0]), 30, 12), 30, 12)
    np.testing.assert_allclose(cut[:15], whole[10:25, 10:22], atol=1e-5)  # float32
    assert not cut[16:].any()


@pytest.mark.parametrize("box", [(40.0, 2.0, 50.0, 9.0), (-9.0, 2.0, -3.0, 9.0), (2.0, 40.0, 5.0, 50.0)])
def test_a_box_outside_the_picture_leaves_nothing(box: tuple[float, ...]) -> None:
    assert not paste(np.ones((28, 28), np.float32), np.array(box), 20, 30).soft.any()


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.0, 0.0), (3.0, 3.0, 3.0, 9.0), (3.0, 9.0, 8.0, 9.0)])
def test_a_box_without_a_side_leaves_nothing(box: tuple[float, ...]) -> None:
    assert not paste(np.ones((28, 28), np.float32), np.array(box), 20, 30).soft.any()


@pytest.mark.golden
def test_pasted_masks_are_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    height, width = (int(length) for length in units["paste_hw"])
    for mask, box, soft, binary in zip(
        units["paste_masks28"], units["paste_boxes"], units["paste_soft"], units["paste_binary"], strict=True
    ):
        picture = unfold(paste(mask, box, height, width), height, width)
        np.testing.assert_allclose(picture, soft, rtol=0.0, atol=1e-5)  # float32
        np.testing.assert_array_equal(picture >= 0.5, binary)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_masks_in_the_pictures_size_are_the_references(golden: Path, name: str) -> None:
    arrays = reference.read_case(golden, name).arrays
    height, width = (int(length) for length in arrays["out_hw"])
    packed = np.unpackbits(arrays["out_masks_packed"], axis=-1)[..., :width].astype(bool)
    pasted = [
        unfold(paste(mask, box, height, width), height, width) >= 0.5
        for mask, box in zip(arrays["det_masks28"], arrays["out_boxes"], strict=True)
    ]
    np.testing.assert_array_equal(np.stack(pasted), packed)
