"""Box arithmetic and NMS give what is computed by hand and what detectron2 computes."""

import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from model.networks.boxes import (
    DeltaWeights,
    apply_deltas,
    box_area,
    get_deltas,
    is_nonempty,
    nms,
)

ONES = (1.0, 1.0, 1.0, 1.0)
BOX = torch.tensor([10.0, 20.0, 30.0, 60.0])


def test_an_extreme_scale_is_limited_to_1000_16() -> None:
    grown = apply_deltas(BOX, torch.tensor([0.0, 0.0, 1e6, 0.0]), ONES)
    assert (grown[2] - grown[0]).item() == pytest.approx(20.0 * 62.5, rel=1e-5)  # float32


def test_degenerate_boxes_are_empty() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0], [1.0, 5.0, 2.0, 5.0], [math.nan] * 4])
    assert is_nonempty(boxes).tolist() == [True, False, False, False]
    assert box_area(boxes[0]).item() == 6.0


@pytest.mark.golden
@pytest.mark.parametrize("stage", range(4))
def test_deltas_equal_detectron2s(golden: Path, stage: int) -> None:
    units = {key: torch.from_numpy(array) for key, array in reference.read_units(golden).items()}
    along_x, along_y, of_width, of_height = units[f"b2b_w{stage}_weights"].tolist()
    weights: DeltaWeights = (along_x, along_y, of_width, of_height)
    deltas_out = get_deltas(units["b2b_src"], units["b2b_tgt"], weights)
    # float32 of boxes up to 3,700 px
    torch.testing.assert_close(deltas_out, units[f"b2b_w{stage}_encode"], rtol=1e-6, atol=1e-6)
    for deltas, key in ((units["b2b_deltas_in"], "decode"), (deltas_out, "roundtrip")):
        moved = apply_deltas(units["b2b_src"], deltas, weights)
        torch.testing.assert_close(moved, units[f"b2b_w{stage}_{key}"], rtol=1e-6, atol=1e-4)


def draw_chain(count: int) -> Tensor:
    """Boxes each of which overlaps the next by 7/13 and the one after by 4/16."""
    left = 3.0 * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 10.0, torch.ones(count)], dim=1)[None]


def all_valid(boxes: Tensor) -> Tensor:
    return torch.ones(boxes.shape[:2], dtype=torch.bool)


def test_boxes_that_overlap_by_exactly_the_threshold_are_kept() -> None:
    pair = torch.tensor([[[0.0, 0.0, 4.0, 1.0], [2.0, 0.0, 4.0, 1.0]]])
    assert nms(pair, all_valid(pair), 0.5, 4).tolist() == [[True, True]]
    assert nms(pair, all_valid(pair), 0.4999, 4).tolist() == [[True, False]]


def test_a_box_needs_as_many_iterations_as_its_chain_is_long() -> None:
    """Box i of the chain depends on box i - 1 and is final after iteration i."""
    chain = draw_chain(9)
    exact = nms(chain, all_valid(chain), 0.5, 9)
    for iterations in range(1, 9):
        is_final = nms(chain, all_valid(chain), 0.5, iterations) == exact
        assert is_final[0, : iterations + 1].all()
        assert is_final.all() == (iterations >= 8)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("key", "threshold", "is_grouped"),
    [("nms_keep_50", 0.5, True), ("nms_keep_65", 0.65, True), ("nms_agnostic_keep_50", 0.5, False)],
)
def test_nms_keeps_the_same_boxes_as_torchvision(golden: Path, key: str, threshold: float, is_grouped: bool) -> None:
    units = reference.read_units(golden)
    order = np.argsort(-units["nms_scores"], kind="stable")
    boxes = torch.from_numpy(units["nms_boxes"][order])[None]
    groups = torch.from_numpy(units["nms_classes"][order])[None] if is_grouped else None
    kept = nms(boxes, all_valid(boxes), threshold, 16, groups)[0].numpy()
    np.testing.assert_array_equal(order[kept], units[key])
