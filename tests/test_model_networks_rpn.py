"""Anchors equal detectron2's, and a fixed number of the best becomes proposals."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from model.networks.fpn import FPN_STRIDES_PX
from model.networks.rpn import (
    ANCHOR_SIDES_PX,
    ProposalConfig,
    Proposals,
    RPNOutput,
    find_top_proposals,
    make_anchors,
)

SIZES = torch.tensor([[64, 64]])


def draw_outputs(batch: int = 1) -> list[RPNOutput]:
    """Predictions for a 64 x 64 image with equal low logits and zero deltas."""
    sides = [64 // stride for stride in FPN_STRIDES_PX]
    return [
        RPNOutput(logits=torch.full((batch, 3, side, side), -9.0), deltas=torch.zeros(batch, 12, side, side))
        for side in sides
    ]


def read_outputs(case: reference.Case) -> list[RPNOutput]:
    return [
        RPNOutput(logits=case.tensor(f"rpn_logits_p{level}"), deltas=case.tensor(f"rpn_deltas_p{level}"))
        for level in range(2, 7)
    ]


def count_unmatched(boxes: Tensor, others: Tensor, noise_px: float) -> int:
    """Number of boxes without an equal one among the others."""
    distance = (boxes[:, None] - others).abs().amax(2)
    return int((distance.amin(1) > noise_px).sum())


def test_the_number_of_proposals_is_constant_with_invalid_ones_last() -> None:
    for sizes in (SIZES, torch.tensor([[1, 1]])):
        found = find_top_proposals(draw_outputs(), sizes, ProposalConfig(pre_nms_topk=50, post_nms_topk=120))
        assert found.boxes.shape == (1, 120, 4)
        assert found.is_valid[0].sum() < 120
        assert found.is_valid[0].long().diff().max() <= 0
        assert (found.logits > -torch.inf).equal(found.is_valid)
    assert find_top_proposals(draw_outputs(), SIZES, ProposalConfig(pre_nms_topk=2)).boxes.shape == (1, 10, 4)


def test_a_level_with_fewer_anchors_than_topk_is_padded_with_invalid_ones() -> None:
    apart = ProposalConfig(pre_nms_topk=2000, post_nms_topk=4000, nms_threshold=1.0)  # nothing is suppressed
    found = find_top_proposals(draw_outputs(), SIZES, apart)
    assert found.boxes.shape == (1, 4000, 4)
    assert int(found.is_valid.sum()) == 3 * (16**2 + 8**2 + 4**2 + 2**2 + 1)


@pytest.mark.golden
@pytest.mark.parametrize("level", range(2, 7))
def test_anchors_equal_detectron2s(golden: Path, level: int) -> None:
    units = reference.read_units(golden)
    stride, side = FPN_STRIDES_PX[level - 2], ANCHOR_SIDES_PX[level - 2]
    height, width = (int(length) for length in units[f"anchors_p{level}_hw"])
    np.testing.assert_array_equal(make_anchors(height, width, stride, side).numpy(), units[f"anchors_p{level}"])
    np.testing.assert_array_equal(make_anchors(1, 1, stride, side).numpy(), units[f"cell_anchors_p{level}"])


def check_proposals(found: Proposals, case: reference.Case, noise_px: float, allowed: int) -> None:
    """Equal as sets, except for `allowed` proposals that float32 rounding may swap at a threshold."""
    boxes, expected = found.boxes[0][found.is_valid[0]], case.tensor("proposal_boxes")[0]
    assert abs(len(boxes) - len(expected)) <= allowed
    assert count_unmatched(boxes, expected, noise_px) <= allowed
    assert count_unmatched(expected, boxes, noise_px) <= allowed


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_proposals_from_stored_predictions_equal_detectron2s(golden: Path, name: str) -> None:
    case = reference.read_case(golden, name)
    found = find_top_proposals(read_outputs(case), case.sizes, ProposalConfig())
    check_proposals(found, case, noise_px=1e-4, allowed=0)
    reference.check_near(found.logits[found.is_valid][None], case.tensor("proposal_logits"), 0.0)
