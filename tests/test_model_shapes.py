"""A graph has the shapes that its contract promises, or is refused."""

from dataclasses import replace

import pytest

from model.contract import Canvas, Contract
from model.errors import ContractMismatch
from model.shapes import list_shapes, require_shapes

CONTRACT = Contract(
    name="a", version="1", network="n", canvases=(Canvas(height_px=56, width_px=84),), stride_px=4, detections=9,
    thing_clusters=3, stuff_clusters=2,
)  # fmt: skip


def test_one_canvas_fixes_every_length() -> None:
    assert list_shapes(CONTRACT) == {
        "pixels": [3, 56, 84],
        "sizes": [2],
        "scores": [9],
        "clusters": [9],
        "boxes": [9, 4],
        "masks": [9, 14, 21],
        "semantic": [3, 14, 21],
    }


def test_masks_in_boxes_have_their_own_size_whatever_the_canvas() -> None:
    several = replace(CONTRACT, box_mask_side=28, canvases=(Canvas.square(56), Canvas.square(84)))
    shapes = list_shapes(several)
    assert (shapes["pixels"], shapes["masks"], shapes["semantic"]) == ([3, None, None], [9, 28, 28], [3, None, None])


def test_another_shape_is_refused_with_both() -> None:
    require_shapes(list_shapes(CONTRACT), CONTRACT)
    other = {**list_shapes(CONTRACT), "scores": [8], "pixels": [3, None, 84]}
    with pytest.raises(
        ContractMismatch, match=r"\[3, 'any', 84\].*'scores': \[8\].* its contract says .*\[3, 56, 84\]"
    ):
        require_shapes(other, CONTRACT)
