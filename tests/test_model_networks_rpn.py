"""A fixed number of the best anchors becomes proposals."""

import torch

from model.networks.fpn import FPN_STRIDES_PX
from model.networks.rpn import (
    ProposalConfig,
    RPNOutput,
    find_top_proposals,
)

SIZES = torch.tensor([[64, 64]])


def draw_outputs(batch: int = 1) -> list[RPNOutput]:
    """Predictions for a 64 x 64 image with equal low logits and zero deltas."""
    sides = [64 // stride for stride in FPN_STRIDES_PX]
    return [
        RPNOutput(logits=torch.full((batch, 3, side, side), -9.0), deltas=torch.zeros(batch, 12, side, side))
        for side in sides
    ]


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
