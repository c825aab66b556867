"""Boxes, NMS, proposals and detections give what is computed by hand and what detectron2 computes."""

import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from model.networks.backbones import FPN_STRIDES_PX
from model.networks.boxes import DeltaWeights, apply_deltas, box_area, get_deltas, is_nonempty, nms
from model.networks.roi_heads import DetectionConfig, Detections, find_top_detections
from model.networks.rpn import ProposalConfig, RPNOutput, find_top_proposals


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
    assert find_top_proposals(draw_outputs(), SIZES, ProposalConfig(pre_nms_topk=2)).boxes.shape == (1, 10, 4)


def test_a_level_with_fewer_anchors_than_topk_is_padded_with_invalid_ones() -> None:
    apart = ProposalConfig(pre_nms_topk=2000, post_nms_topk=4000, nms_threshold=1.0)  # nothing is suppressed
    found = find_top_proposals(draw_outputs(), SIZES, apart)
    assert found.boxes.shape == (1, 4000, 4)
    assert int(found.is_valid.sum()) == 3 * (16**2 + 8**2 + 4**2 + 2**2 + 1)


CONFIG = DetectionConfig(max_detections=4)
HERE, NEAR, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]


def select(
    probabilities: list[list[float]],
    boxes: list[list[float]],
    config: DetectionConfig = CONFIG,
    valid: Tensor | None = None,
) -> Detections:
    is_valid = torch.ones(1, len(boxes), dtype=torch.bool) if valid is None else valid
    return find_top_detections(torch.tensor([probabilities]), torch.tensor([boxes]), is_valid, config)


def test_detections_are_sorted_by_score_and_padded_with_zeros() -> None:
    found = select([[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]], [HERE, FAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.3, 0.2, 0.0]]))
    assert found.clusters.tolist() == [[0, 1, 0, 0]]
    assert found.boxes.tolist() == [[FAR, HERE, HERE, [0.0] * 4]]


def test_an_invalid_box_is_not_detected_and_suppresses_nothing() -> None:
    found = select([[0.9, 0.0, 0.1], [0.4, 0.0, 0.6]], [HERE, NEAR], valid=torch.tensor([[False, True]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.4, 0.0, 0.0, 0.0]]))


def test_only_the_best_candidates_enter_nms() -> None:
    found = select([[0.5, 0.3, 0.2]], [HERE], DetectionConfig(max_candidates=1, max_detections=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_at_most_max_detections_are_kept() -> None:
    found = select([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], [HERE, FAR], DetectionConfig(max_detections=2))
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.5]]))
