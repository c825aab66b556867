"""Detections are the best pairs of box and cluster, in a fixed number of places."""

from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from model.errors import ConfigError
from model.network.boxes import clip
from model.network.detections import DetectionLimits, Detections, select_detections

LIMITS = DetectionLimits(total=4)
HERE, NEAR, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]


def select(
    chances: list[list[float]], boxes: list[list[float]], limits: DetectionLimits = LIMITS, used: Tensor | None = None
) -> Detections:
    is_used = torch.ones(1, len(boxes), dtype=torch.bool) if used is None else used
    return select_detections(torch.tensor([chances]), torch.tensor([boxes]), is_used, limits)


def test_detections_come_by_descending_score_and_zeros_fill_the_rest() -> None:
    found = select([[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]], [HERE, FAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.3, 0.2, 0.0]]))
    assert found.clusters.tolist() == [[0, 1, 0, 0]]
    assert found.boxes.tolist() == [[FAR, HERE, HERE, [0.0] * 4]]


def test_the_last_class_is_none_and_never_found() -> None:
    assert select([[0.01, 0.02, 0.97]], [HERE]).scores.tolist() == [[0.0] * 4]


def test_a_score_must_pass_its_limit() -> None:
    found = select([[0.25, 0.5, 0.25]], [HERE], DetectionLimits(score=0.25, total=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_boxes_are_suppressed_within_their_cluster_alone() -> None:
    found = select([[0.5, 0.2, 0.3], [0.4, 0.3, 0.3]], [HERE, NEAR])
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    assert found.clusters[0, :2].tolist() == [0, 1]


def test_an_unused_box_is_no_detection_and_suppresses_none() -> None:
    found = select([[0.9, 0.0, 0.1], [0.4, 0.0, 0.6]], [HERE, NEAR], used=torch.tensor([[False, True]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.4, 0.0, 0.0, 0.0]]))


def test_pairs_beyond_the_candidates_take_no_part() -> None:
    found = select([[0.5, 0.3, 0.2]], [HERE], DetectionLimits(candidates=1, total=4))
    assert found.scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_the_best_fill_the_places_where_there_are_too_many() -> None:
    found = select([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], [HERE, FAR], DetectionLimits(total=2))
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.5]]))


@pytest.mark.parametrize("wrong", [{"total": 0}, {"candidates": 0}, {"sweeps": 0}, {"score": -0.1}, {"overlap": 2}])
def test_limits_without_a_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        DetectionLimits(**wrong)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_detections_from_stored_scores_are_the_references(golden: Path, name: str) -> None:
    case = reference.read_case(golden, name)
    probabilities, boxes = case.tensor("mean_scores"), clip(case.tensor("final_boxes_all"), case.sizes)
    is_used = torch.ones(boxes.shape[:2], dtype=torch.bool)
    found = select_detections(probabilities, boxes, is_used, DetectionLimits())
    count = len(case.arrays["det_scores"])
    assert int((found.scores > 0.0).sum()) == count
    assert found.clusters[:, :count].equal(case.tensor("det_classes"))
    assert found.scores[:, :count].equal(case.tensor("det_scores"))
    reference.check_near(found.boxes[:, :count], case.tensor("det_boxes"), 0.0)
