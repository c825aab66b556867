"""Detections are the best pairs of box and cluster, and limits are checked."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import DetectionConfig, Detections, find_top_detections
from model.networks.rpn import ProposalConfig

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
