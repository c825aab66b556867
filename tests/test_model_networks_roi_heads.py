"""Stages, masks and selection of detections equal detectron2's."""

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
        pooling=RoiAlignConfig(max_box_side=14),
    )
    return heads.requires_grad_(False)


def draw_levels() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, 4, 16 >> level, 24 >> level, generator=generator) for level in range(5))


def test_a_stage_with_zero_deltas_leaves_boxes_unchanged() -> None:
    heads = draw_heads()
    for weight in heads.box_predictor.parameters():
        weight.fill_(0.0)
    output = heads.run_stage(0, draw_levels(), BOXES)
    torch.testing.assert_close(output.boxes, BOXES)
    assert output.logits.shape == (2, 3, 4)


def test_probabilities_are_averaged_over_stages_that_refine_each_others_boxes() -> None:
    heads, levels = draw_heads(), draw_levels()
    boxes, probabilities_by_stage = BOXES, []
    for stage in range(3):
        output = heads.run_stage(stage, levels, boxes)
        probabilities_by_stage.append(output.logits.softmax(-1))
        limits = torch.stack([SIZES[:, 1], SIZES[:, 0], SIZES[:, 1], SIZES[:, 0]], dim=1)[:, None]
        boxes = torch.minimum(output.boxes.clamp(min=0.0), limits)
    probabilities, refined = heads.predict_boxes(levels, BOXES, SIZES)
    torch.testing.assert_close(probabilities, sum(probabilities_by_stage) / 3.0)
    torch.testing.assert_close(refined, boxes)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3))


def test_a_mask_is_predicted_by_the_channel_of_its_cluster() -> None:
    torch.manual_seed(3)
    head = MaskHead(inner=4, width=8, channels=3).requires_grad_(False)
    pooled = torch.randn(1, 2, 4, 14, 14, generator=torch.Generator().manual_seed(4))
    before = head(pooled, torch.tensor([[2, 0]]))
    assert head.predictor.bias is not None
    head.predictor.bias[2] += 1.0
    after = head(pooled, torch.tensor([[2, 0]]))
    torch.testing.assert_close(after - before, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 28, 28))


def test_a_class_agnostic_mask_is_the_same_for_each_cluster() -> None:
    heads, levels = draw_heads(mask_channels=1), draw_levels()
    first = heads.predict_masks(levels, BOXES, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(first, heads.predict_masks(levels, BOXES, torch.full((2, 3), 2)))
    assert first.shape == (2, 3, 28, 28)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
@pytest.mark.parametrize("stage", range(3))
def test_stages_equal_detectron2s(golden: Path, name: str, stage: int) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    output = network.roi_heads.run_stage(stage, case.levels, case.tensor(f"stage{stage}_boxes_in"))
    reference.check_near(output.logits, case.tensor(f"stage{stage}_cls_logits"), reference.FEATURE_NOISE)
    reference.check_near(output.deltas, case.tensor(f"stage{stage}_deltas"), reference.FEATURE_NOISE)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_scores_and_boxes_equal_detectron2s(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    probabilities, boxes = network.roi_heads.predict_boxes(case.levels, case.tensor("proposal_boxes"), case.sizes)
    height, width = case.sizes[0].tolist()
    unclipped = case.tensor("final_boxes_all")
    expected = torch.minimum(unclipped.clamp(min=0.0), torch.tensor([width, height, width, height]))
    reference.check_near(probabilities, case.tensor("mean_scores"), reference.SCORE_NOISE)
    reference.check_near(boxes, expected, reference.BOX_NOISE_PX)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_masks_equal_detectron2s(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    logits = network.roi_heads.predict_masks(case.levels, case.tensor("det_boxes"), case.tensor("det_classes"))
    reference.check_near(logits.sigmoid(), case.tensor("det_masks28"), reference.MASK_NOISE)


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


def test_the_no_object_class_is_never_detected() -> None:
    assert select([[0.01, 0.02, 0.97]], [HERE]).scores.tolist() == [[0.0] * 4]


def test_a_score_must_exceed_the_threshold() -> None:
    found = select([[0.25, 0.5, 0.25]], [HERE], DetectionConfig(score_threshold=0.25, max_detections=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_nms_is_applied_within_each_cluster() -> None:
    found = select([[0.5, 0.2, 0.3], [0.4, 0.3, 0.3]], [HERE, NEAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    assert found.clusters[0, :2].tolist() == [0, 1]


def test_an_invalid_box_is_not_detected_and_suppresses_nothing() -> None:
    found = select([[0.9, 0.0, 0.1], [0.4, 0.0, 0.6]], [HERE, NEAR], valid=torch.tensor([[False, True]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.4, 0.0, 0.0, 0.0]]))


def test_only_the_best_candidates_enter_nms() -> None:
    found = select([[0.5, 0.3, 0.2]], [HERE], DetectionConfig(max_candidates=1, max_detections=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_at_most_max_detections_are_kept() -> None:
    found = select([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], [HERE, FAR], DetectionConfig(max_detections=2))
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.5]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_detections": 0},
        {"max_candidates": 0},
        {"nms_iterations": 0},
        {"score_threshold": -0.1},
        {"nms_threshold": 2},
    ],
)
def test_detection_configs_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        DetectionConfig(**wrong)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_detections_equal_detectron2s(golden: Path, name: str) -> None:
    case = reference.read_case(golden, name)
    probabilities, boxes = case.tensor("mean_scores"), clip_boxes(case.tensor("final_boxes_all"), case.sizes)
    is_valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    found = find_top_detections(probabilities, boxes, is_valid, DetectionConfig())
    count = len(case.arrays["det_scores"])
    assert int((found.scores > 0.0).sum()) == count
    assert found.clusters[:, :count].equal(case.tensor("det_classes"))
    assert found.scores[:, :count].equal(case.tensor("det_scores"))
    reference.check_near(found.boxes[:, :count], case.tensor("det_boxes"), 0.0)
