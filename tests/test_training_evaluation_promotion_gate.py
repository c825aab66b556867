from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_predictor import CAR, CAT, SKY, WALL, draw_dataset, predict_scenes
from tiny import make_contract

from model.drift import build_histograms
from model.errors import ConfigError
from model.postprocessing.panoptic import Segment, Segmentation, output_statistics
from training.evaluation.promotion_gate import (
    MIN_DRIFT_PHOTOS,
    PromotionThresholds,
    check_drift,
    check_scores,
    check_similarity,
    segmentation_covering,
)

CONTRACT = make_contract(9, 0, 64, name="small", version="2", max_detections=1)
DEFAULT = PromotionThresholds()


def draw(*rows: list[int]) -> Segmentation:
    label_map = np.array(rows, np.uint8)
    ids = [int(each) for each in np.unique(label_map) if each]
    segments = tuple(Segment(id=each, cluster=1, is_thing=True, score=0.5) for each in ids)
    return Segmentation(label_map=label_map, segments=segments)


@pytest.mark.parametrize(
    ("first", "second", "covering"),
    [
        ([1, 1, 2, 2], [2, 2, 1, 1], 1.0),
        # the whole covers each half to 1/2, and is covered by each half to 1/2
        ([1, 1, 2, 2], [1, 1, 1, 1], 0.5),
        # of two halves, one is found and one is missing; the one that is found is right
        ([1, 1, 2, 2], [0, 0, 5, 5], (0.5 + 1.0) / 2),
        ([0, 0], [0, 0], 1.0),
        ([0, 0], [1, 1], 0.0),
    ],
)
def test_covering_is_the_mean_of_both_directions(first: list[int], second: list[int], covering: float) -> None:
    assert segmentation_covering(draw(first), draw(second)) == covering


def test_a_version_with_equal_predictions_passes() -> None:
    checks = check_similarity([(draw([1, 1, 2, 2]), draw([1, 1, 2, 2]))], DEFAULT)
    assert [(each.name, each.value, each.is_passed) for each in checks] == [
        ("covering", 1.0, True), ("segments", 1.0, True), ("void", 0.0, True),
    ]  # fmt: skip


def test_a_version_that_finds_little_is_rejected_with_the_values() -> None:
    pairs = [(draw([1, 2, 3, 4]), draw([1, 0, 0, 0]))]
    covering, segments, void = check_similarity(pairs, PromotionThresholds(min_covering=0.9))
    assert [each.is_passed for each in (covering, segments, void)] == [False, False, False]
    assert covering.reason == "segmentation covering is 0.62, minimum 0.9"
    assert segments.reason == "4.0 segments per photo became 1.0, maximum ratio 2"
    assert void.reason == "void fraction changed by +0.75, maximum 0.15"
    assert [each.is_passed for each in check_similarity(pairs, DEFAULT)] == [True, False, False]


def test_similarity_needs_photos() -> None:
    with pytest.raises(ConfigError, match="no readable photos"):
        check_similarity([], DEFAULT)


def test_drift_is_checked_against_the_reference_of_the_version() -> None:
    same, other = draw([1, 2, 3, 0]), draw([1, 2, 3, 4])
    contract = replace(CONTRACT, drift_reference=dict(build_histograms([output_statistics(same)] * 9)))
    checks = {each.name: each for each in check_drift([same] * MIN_DRIFT_PHOTOS, contract, DEFAULT)}
    assert (checks["drift of void"].value, checks["drift of void"].is_passed) == (0.0, True)
    checks = {each.name: each for each in check_drift([other] * MIN_DRIFT_PHOTOS, contract, DEFAULT)}
    assert not checks["drift of void"].is_passed
    assert checks["drift of void"].reason.endswith("maximum 0.25")


def test_drift_needs_a_reference_and_enough_photos() -> None:
    contract = replace(CONTRACT, drift_reference=dict(build_histograms([output_statistics(draw([1]))] * 9)))
    with pytest.raises(ConfigError, match="needs at least 200 readable photos, got 199"):
        check_drift([draw([1])] * (MIN_DRIFT_PHOTOS - 1), contract, DEFAULT)
    with pytest.raises(ConfigError, match="small 2 has no drift reference"):
        check_drift([], CONTRACT, DEFAULT)


def compare(
    folder: Path, new: list[tuple[int, int]], thresholds: PromotionThresholds = DEFAULT
) -> dict[str, tuple[float, bool, str]]:
    dataset = draw_dataset(folder / "set", [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY)])
    old = predict_scenes(dataset, [(1, 3), (1, 3), (2, 4), (2, 4)])
    checks = check_scores(predict_scenes(dataset, new), old, dataset, thresholds)
    return {each.name: (each.value, each.is_passed, each.reason) for each in checks}


def test_renumbered_clusters_pass_and_lower_scores_are_rejected(tmp_path: Path) -> None:
    # Clusters 1 and 2, 3 and 4 are exchanged: the mapping follows.
    assert compare(tmp_path / "a", [(2, 4), (2, 4), (1, 3), (1, 3)])["PQ"][1]
    # No object is found any more: AP drops from 100 to 0.
    checks = compare(tmp_path / "b", [(3, 3), (3, 3), (4, 4), (4, 4)])
    assert checks["AP"] == (-100.0, False, "AP differs by -100.00 (-100.00 to -100.00), minimum -1.00")
    assert not checks["PQ"][1]


def test_a_difference_that_is_uncertain_is_rejected_with_a_hint(tmp_path: Path) -> None:
    checks = compare(tmp_path, [(1, 3), (3, 3), (2, 4), (2, 4)], PromotionThresholds(max_score_drop=60.0))
    value, is_passed, reason = checks["AP"]
    assert (value < -60.0, is_passed) == (True, False)
    assert reason.endswith(": 4 images are too few to be certain")
