"""Each stage of the cascade, and the masks, are detectron2's."""

from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from model.network.cascade import CascadeHeads, MaskHead
from model.network.roi import Sampling

SIZES = torch.tensor([[64, 96], [50, 60]])
BOXES = torch.tensor([[[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 60.0, 50.0], [10.0, 20.0, 30.0, 48.0]]]).expand(2, 3, 4)


def draw_heads(mask_channels: int = 3) -> CascadeHeads:
    torch.manual_seed(1)
    heads = CascadeHeads(
        inner=4, box_width=16, mask_width=8, clusters=3, mask_channels=mask_channels, sampling=Sampling(reach=14)
    )
    return heads.requires_grad_(False)


def draw_levels() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, 4, 16 >> level, 24 >> level, generator=generator) for level in range(5))


def test_a_stage_that_says_nothing_leaves_boxes_where_they_are() -> None:
    heads = draw_heads()
    for weight in heads.box_predictor.parameters():
        weight.fill_(0.0)
    output = heads.run_stage(0, draw_levels(), BOXES)
    torch.testing.assert_close(output.boxes, BOXES)
    assert output.logits.shape == (2, 3, 4)


def test_probabilities_are_the_mean_of_the_stages_each_on_the_boxes_of_the_one_before() -> None:
    heads, levels = draw_heads(), draw_levels()
    boxes, chances = BOXES, []
    for stage in range(3):
        output = heads.run_stage(stage, levels, boxes)
        chances.append(output.logits.softmax(-1))
        limits = torch.stack([SIZES[:, 1], SIZES[:, 0], SIZES[:, 1], SIZES[:, 0]], dim=1)[:, None]
        boxes = torch.minimum(output.boxes.clamp(min=0.0), limits)
    probabilities, refined = heads.refine(levels, BOXES, SIZES)
    torch.testing.assert_close(probabilities, sum(chances) / 3.0)
    torch.testing.assert_close(refined, boxes)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3))


def test_a_mask_is_the_channel_of_its_cluster() -> None:
    torch.manual_seed(3)
    head = MaskHead(inner=4, width=8, channels=3).requires_grad_(False)
    pooled = torch.randn(1, 2, 4, 14, 14, generator=torch.Generator().manual_seed(4))
    before = head(pooled, torch.tensor([[2, 0]]))
    assert head.predictor.bias is not None
    head.predictor.bias[2] += 1.0
    after = head(pooled, torch.tensor([[2, 0]]))
    torch.testing.assert_close(after - before, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 28, 28))


def test_a_mask_for_all_clusters_is_the_same_for_each() -> None:
    heads, levels = draw_heads(mask_channels=1), draw_levels()
    first = heads.draw_masks(levels, BOXES, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(first, heads.draw_masks(levels, BOXES, torch.full((2, 3), 2)))
    assert first.shape == (2, 3, 28, 28)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
@pytest.mark.parametrize("stage", range(3))
def test_stages_on_stored_boxes_are_the_references(golden: Path, name: str, stage: int) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    output = network.roi_heads.run_stage(stage, case.levels, case.tensor(f"stage{stage}_boxes_in"))
    reference.check_near(output.logits, case.tensor(f"stage{stage}_cls_logits"), reference.FEATURE_NOISE)
    reference.check_near(output.deltas, case.tensor(f"stage{stage}_deltas"), reference.FEATURE_NOISE)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_scores_and_boxes_from_stored_proposals_are_the_references(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    probabilities, boxes = network.roi_heads.refine(case.levels, case.tensor("proposal_boxes"), case.sizes)
    height, width = case.sizes[0].tolist()
    uncut = case.tensor("final_boxes_all")
    expected = torch.minimum(uncut.clamp(min=0.0), torch.tensor([width, height, width, height]))
    reference.check_near(probabilities, case.tensor("mean_scores"), reference.SCORE_NOISE)
    reference.check_near(boxes, expected, reference.BOX_NOISE_PX)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_masks_of_stored_detections_are_the_references(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    logits = network.roi_heads.draw_masks(case.levels, case.tensor("det_boxes"), case.tensor("det_classes"))
    reference.check_near(logits.sigmoid(), case.tensor("det_masks28"), reference.MASK_NOISE)
