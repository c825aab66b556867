"""Each stage of the cascade, and the masks, are detectron2's."""

from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from model.errors import ConfigError
from model.networks.boxes import clip_boxes
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import CascadeROIHeads, DetectionConfig, Detections, MaskHead, find_top_detections

SIZES = torch.tensor([[64, 96], [50, 60]])
BOXES = torch.tensor([[[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 60.0, 50.0], [10.0, 20.0, 30.0, 48.0]]]).expand(2, 3, 4)


def draw_heads(mask_channels: int = 3) -> CascadeROIHeads:
    torch.manual_seed(1)
    heads = CascadeROIHeads(
        inner=4,
        box_fc_dim=16,
        mask_conv_dim=8,
        clusters=3,
        mask_channels=mask_channels,
        sampling=RoiAlignConfig(max_cells=14),
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


LIMITS = DetectionConfig(total=4)
HERE, NEAR, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]


def select(
    chances: list[list[float]], boxes: list[list[float]], limits: DetectionConfig = LIMITS, used: Tensor | None = None
) -> Detections:
    is_used = torch.ones(1, len(boxes), dtype=torch.bool) if used is None else used
    return find_top_detections(torch.tensor([chances]), torch.tensor([boxes]), is_used, limits)


def test_detections_come_by_descending_score_and_zeros_fill_the_rest() -> None:
    found = select([[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]], [HERE, FAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.3, 0.2, 0.0]]))
    assert found.clusters.tolist() == [[0, 1, 0, 0]]
    assert found.boxes.tolist() == [[FAR, HERE, HERE, [0.0] * 4]]


def test_the_last_class_is_none_and_never_found() -> None:
    assert select([[0.01, 0.02, 0.97]], [HERE]).scores.tolist() == [[0.0] * 4]


def test_a_score_must_pass_its_limit() -> None:
    found = select([[0.25, 0.5, 0.25]], [HERE], DetectionConfig(score=0.25, total=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_boxes_are_suppressed_within_their_cluster_alone() -> None:
    found = select([[0.5, 0.2, 0.3], [0.4, 0.3, 0.3]], [HERE, NEAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    assert found.clusters[0, :2].tolist() == [0, 1]


def test_an_unused_box_is_no_detection_and_suppresses_none() -> None:
    found = select([[0.9, 0.0, 0.1], [0.4, 0.0, 0.6]], [HERE, NEAR], used=torch.tensor([[False, True]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.4, 0.0, 0.0, 0.0]]))


def test_pairs_beyond_the_candidates_take_no_part() -> None:
    found = select([[0.5, 0.3, 0.2]], [HERE], DetectionConfig(candidates=1, total=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_the_best_fill_the_places_where_there_are_too_many() -> None:
    found = select([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], [HERE, FAR], DetectionConfig(total=2))
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.5]]))


@pytest.mark.parametrize(
    "wrong", [{"total": 0}, {"candidates": 0}, {"nms_iterations": 0}, {"score": -0.1}, {"overlap": 2}]
)
def test_limits_without_a_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        DetectionConfig(**wrong)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_detections_from_stored_scores_are_the_references(golden: Path, name: str) -> None:
    case = reference.read_case(golden, name)
    probabilities, boxes = case.tensor("mean_scores"), clip_boxes(case.tensor("final_boxes_all"), case.sizes)
    is_used = torch.ones(boxes.shape[:2], dtype=torch.bool)
    found = find_top_detections(probabilities, boxes, is_used, DetectionConfig())
    count = len(case.arrays["det_scores"])
    assert int((found.scores > 0.0).sum()) == count
    assert found.clusters[:, :count].equal(case.tensor("det_classes"))
    assert found.scores[:, :count].equal(case.tensor("det_scores"))
    reference.check_near(found.boxes[:, :count], case.tensor("det_boxes"), 0.0)
