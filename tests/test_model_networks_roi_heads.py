"""Stages, masks and selection of detections equal detectron2's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from model.errors import ConfigError
from model.networks.boxes import clip_boxes
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import DetectionConfig, Detections, find_top_detections
from model.networks.rpn import ProposalConfig


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


@pytest.mark.parametrize(
    "config",
    [
        *(partial(DetectionConfig, **{name: 0}) for name in ("max_detections", "max_candidates", "nms_iterations")),
        *(partial(DetectionConfig, **{name: 1.5}) for name in ("score_threshold", "nms_threshold")),
        *(partial(ProposalConfig, **{name: 0}) for name in ("post_nms_topk", "pre_nms_topk", "nms_iterations")),
        partial(ProposalConfig, nms_threshold=1.5),
        partial(RoiAlignConfig, max_box_side=0),
    ],
)
def test_limits_of_inference_out_of_range_are_refused(config: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        config()


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
