from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_source import ToldSource, draw_scene, draw_set

from model.contract import Contract, InputSize
from model.drift import build_histograms, output_statistics
from model.errors import ConfigError
from model.postprocessing.panoptic import Segment, Segmentation
from training.evaluation.promotion_gate import (
    MIN_DRIFT_IMAGES,
    PromotionThresholds,
    check_scores,
    check_similarity,
    segmentation_covering,
)

CAT, CAR, WALL, SKY = 17, 3, 171, 187
CONTRACT = Contract(
    name="small",
    version="2",
    network="none",
    input_sizes=(InputSize.square(64),),
    stride_px=4,
    detections=1,
    thing_clusters=9,
    stuff_clusters=0,
)


def draw(*rows: list[int]) -> Segmentation:
    label_map = np.array(rows, np.uint8)
    found = [int(each) for each in np.unique(label_map) if each]
    return Segmentation(
        label_map=label_map, segments=tuple(Segment(id=each, cluster=1, is_thing=True, score=0.5) for each in found)
    )


def test_agreement_is_the_covering_both_ways_whatever_the_numbers() -> None:
    halves, turned = draw([1, 1, 2, 2]), draw([2, 2, 1, 1])
    assert segmentation_covering(halves, turned) == 1.0
    # the whole covers each half to 1/2, and is itself covered to 1/2
    assert segmentation_covering(halves, draw([1, 1, 1, 1])) == 0.5
    # of two halves, one is found whole and one not at all; what is found is right
    assert segmentation_covering(halves, draw([0, 0, 5, 5])) == (0.5 + 1.0) / 2


def test_nothing_agrees_with_nothing_alone() -> None:
    assert segmentation_covering(draw([0, 0]), draw([0, 0])) == 1.0
    assert segmentation_covering(draw([0, 0]), draw([1, 1])) == 0.0


def check(
    old: Segmentation, new: Segmentation, rule: PromotionThresholds, times: int = 1
) -> dict[str, tuple[float, bool]]:
    contract = replace(CONTRACT, reference=dict(build_histograms([output_statistics(draw([1, 2, 3, 0]))] * 9)))
    checks = check_similarity([(old, new)] * times, contract, rule)
    return {each.name: (each.value, each.is_passed) for each in checks}


def test_a_version_that_answers_alike_passes() -> None:
    found = check(draw([1, 1, 2, 2]), draw([1, 1, 2, 2]), PromotionThresholds())
    assert found == {"agreement": (1.0, True), "segments": (1.0, True), "void": (0.0, True)}


def test_a_version_that_finds_little_is_refused_with_the_figures() -> None:
    old, new = draw([1, 2, 3, 4]), draw([1, 0, 0, 0])
    found = check(old, new, PromotionThresholds())
    assert found["segments"] == (4.0, False)
    assert found["void"] == (0.75, False)
    assert found["agreement"] == ((0.25 + 1.0) / 2, True)
    (agreement, segments, void) = check_similarity([(old, new)], CONTRACT, PromotionThresholds(agreement=0.9))
    assert agreement.reason == "segments agree to 0.62, 0.9 is the least"
    assert segments.reason == "4.0 segments a photo became 1.0, 2 is the most"
    assert void.reason == "the share of void rose by +0.75, 0.15 is the most"


def test_the_reference_is_compared_from_enough_answers_on() -> None:
    same, other = draw([1, 2, 3, 0]), draw([1, 2, 3, 4])
    assert "drift of void" not in check(same, same, PromotionThresholds(), MIN_DRIFT_IMAGES - 1)
    assert check(same, same, PromotionThresholds(), MIN_DRIFT_IMAGES)["drift of void"] == (0.0, True)
    assert not check(same, other, PromotionThresholds(), MIN_DRIFT_IMAGES)["drift of void"][1]


def test_without_photos_there_is_nothing_to_tell() -> None:
    with pytest.raises(ConfigError, match="no photo was answered"):
        check_similarity([], CONTRACT, PromotionThresholds())


def compare(folder: Path, new: list[tuple[int, int]], rule: PromotionThresholds) -> dict[str, tuple[float, bool, str]]:
    scenes = [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY)]
    truth = draw_set(folder / "set", [draw_scene(*each) for each in scenes])
    right = [(1, 3), (1, 3), (2, 4), (2, 4)]
    later, earlier = (ToldSource(truth, [draw_scene(*each) for each in pairs]) for pairs in (new, right))
    checks = check_scores(later, earlier, truth, rule)
    return {each.name: (each.value, each.is_passed, each.reason) for each in checks}


def test_the_same_scores_pass_however_few_the_pictures(tmp_path: Path) -> None:
    found = compare(tmp_path, [(1, 3), (1, 3), (2, 4), (2, 4)], PromotionThresholds(margin=0.0))
    assert {name: each[:2] for name, each in found.items()} == {"PQ": (0.0, True), "AP": (0.0, True)}


def test_worse_scores_are_refused_and_other_names_of_clusters_are_not(tmp_path: Path) -> None:
    # Clusters 1 and 2, 3 and 4 changed places: matching makes good for that.
    assert compare(tmp_path / "a", [(2, 4), (2, 4), (1, 3), (1, 3)], PromotionThresholds())["PQ"][1]
    # No object is found any more: masks have an AP of 0, before it was 100.
    found = compare(tmp_path / "b", [(3, 3), (3, 3), (4, 4), (4, 4)], PromotionThresholds())
    assert found["AP"] == (-100.0, False, "AP differs by -100.00 (-100.00 to -100.00), -1.00 is the least")
    assert not found["PQ"][1]


def test_a_difference_that_few_pictures_cannot_tell_is_refused_and_said(tmp_path: Path) -> None:
    found = compare(tmp_path, [(1, 3), (3, 3), (2, 4), (2, 4)], PromotionThresholds(margin=60.0))
    value, is_passed, reason = found["AP"]
    assert (value < -60.0, is_passed) == (True, False)
    assert reason.endswith(": 4 pictures cannot tell more")


@pytest.mark.parametrize("changes", [{"margin": -1.0}, {"segments": 0.5}, {"agreement": 2.0}, {"drift": 0.0}])
def test_a_rule_that_is_none_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PromotionThresholds(**changes)
