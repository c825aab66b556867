import importlib.util

import numpy as np
import pytest

from model.contract import InputSize
from model.errors import ConfigError
from model.images import plan_letterbox
from training.pseudo_labels.codebook import segment_stuff
from training.pseudo_labels.refinement import (
    GuidedFilter,
    check_crf_available,
    make_dense_crf,
    refine_masks,
    refine_stuff,
)

has_crf = importlib.util.find_spec("pydensecrf") is not None
needs_crf = pytest.mark.skipif(not has_crf, reason="pydensecrf2 is absent: install useg[crf]")
each_method = pytest.mark.parametrize("method", ["guided", pytest.param("crf", marks=needs_crf)])


def draw_edge() -> np.ndarray:
    """Light up to column 218, dark from there."""
    image = np.zeros((448, 448, 3), np.uint8)
    image[:, :218] = 230
    return image


@each_method
def test_a_mask_border_moves_to_the_image_edge(method: str) -> None:
    patches = np.zeros((2, 32, 32), bool)
    patches[0, :, :16] = True  # ends at pixel 224, six too far
    patches[1, :, 16:] = True
    fine = refine_masks(patches, draw_edge(), 14, method)  # type: ignore[arg-type]
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


@needs_crf
def test_the_dense_crf_removes_a_speck_and_fills_a_hole() -> None:
    soft = np.zeros((90, 90), np.float32)
    soft[20:70, 20:70] = 1.0
    soft[40:42, 40:42] = 0.0
    soft[2, 2] = 1.0
    image = np.zeros((90, 90, 3), np.uint8)
    image[20:70, 20:70] = 200
    expected = np.zeros((90, 90), bool)
    expected[20:70, 20:70] = True
    assert (make_dense_crf(image)(soft) == expected).all()


@pytest.mark.skipif(has_crf, reason="pydensecrf2 is installed")
def test_a_missing_crf_package_is_an_error_with_the_extra_to_install() -> None:
    with pytest.raises(ConfigError, match=r"useg\[crf\]"):
        check_crf_available("stuff refinement")


@needs_crf
def test_stuff_borders_move_to_where_the_color_changes() -> None:
    image = np.full((56, 56, 3), 30, np.uint8)
    image[:, 24:] = 220  # four pixels before the patches change sides
    cosines = np.zeros((4, 4, 2), np.float32)
    cosines[:, :2, 0] = cosines[:, 2:, 1] = 1.0
    letterbox = plan_letterbox(56, 56, [InputSize.square(56)], 4)
    before = segment_stuff(cosines, np.eye(2, dtype=np.float32), 14, letterbox)
    assert (before[:, 25] == 1).all()
    after = refine_stuff(image, cosines, 14, letterbox)
    assert (after[:, :24] == 1).all()
    assert (after[:, 24:] == 2).all()
