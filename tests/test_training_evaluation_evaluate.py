from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_source import SIDE, ToldSource, draw_scene, draw_set

from model.errors import ConfigError, LabelStoreError
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import compute_report, evaluate, fit_mapping
from training.evaluation.image_results import count_cooccurrences, evaluate_all, evaluate_image, label_spaces
from training.evaluation.matching.class_mapping import MatchingConfig
from training.evaluation.matching.cluster_matching import VoteThresholds

CAT, CAR, WALL, SKY = 17, 3, 171, 187
RIGHT = {CAT: 1, CAR: 2, WALL: 3, SKY: 4}
"""A cluster for each category."""


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruthDataset:
    """Four pictures; each category is in both halves."""
    scenes = [draw_scene(CAT, WALL), draw_scene(CAT, WALL), draw_scene(CAR, SKY), draw_scene(CAR, SKY)]
    return draw_set(tmp_path / "set", scenes)


def tell(truth: GroundTruthDataset, pairs: list[tuple[int, int]]) -> ToldSource:
    return ToldSource(truth, [draw_scene(thing, stuff) for thing, stuff in pairs])


def test_answers_that_are_right_up_to_their_names_score_one_hundred(truth: GroundTruthDataset) -> None:
    report, fit = evaluate(tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)]), truth, MatchingConfig())
    summary = report.summary
    for figures in (summary.panoptic, summary.semantic, summary.semantic_things_as_one):
        assert {(each.value, each.low, each.high) for each in figures.values()} == {(100.0, 100.0, 100.0)}
    for instance in summary.instance.values():
        assert instance.headline["ap"].value == 100.0
    assert set(summary.instance) == {"agnostic_box", "agnostic_mask", "named_box", "named_mask"}
    assert [each.categories for each in report.clusters] == [
        ("animal", "animal"), ("vehicle", "vehicle"), ("wall", "wall"), ("sky", "sky"), (None, None),
    ]  # fmt: skip
    assert not fit.evaluated_on_fit_set
    assert "even pictures" in summary.matching.fitted_on


def test_a_picture_is_never_scored_with_what_it_was_fitted_on_itself(tmp_path: Path) -> None:
    pairs = [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY), (CAT, WALL), (CAT, WALL)]
    truth = draw_set(tmp_path / "set", [draw_scene(*each) for each in pairs])
    # Cluster 5 is seen in picture 1 alone: its half has a name for it, the other half, by which it is scored, has none.
    report, _ = evaluate(tell(truth, [(1, 5), (1, 3), (2, 4), (2, 4), (1, 3), (1, 3)]), truth, MatchingConfig())
    assert report.summary.matching.unmatched_clusters == 1
    # Wall: of four segments three are matched, one is missed, and the nameless one is an error where it lies.
    wall = next(each for each in report.classes if each.name == "wall")
    assert (wall.pq, wall.iou) == (75.0, 75.0)
    assert report.summary.panoptic["pq"].value == pytest.approx((3 + 3 / 4) / 4 * 100, abs=0.01)
    assert report.summary.panoptic["pq_lenient"].value == pytest.approx((3 + 3 / 3.5) / 4 * 100, abs=0.01)
    assert report.summary.semantic["accuracy"].value == pytest.approx(100 * (9600 - 1200) / 9600, abs=0.01)
    assert report.summary.semantic["accuracy_lenient"].value == 100.0


def test_fitting_on_the_scored_set_takes_a_flag_and_is_written_down(truth: GroundTruthDataset) -> None:
    source = tell(truth, [(1, 5), (1, 3), (2, 4), (2, 4)])
    report, _ = evaluate(source, truth, MatchingConfig(is_same_set=True))
    assert report.summary.matching.evaluated_on_fit_set
    assert report.summary.panoptic["pq"].value == 100.0
    assert "upper bound" in report.summary.matching.fitted_on


def test_names_of_one_set_are_applied_to_another(truth: GroundTruthDataset, tmp_path: Path) -> None:
    source = tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)])
    names = fit_mapping(source, truth, MatchingConfig())
    other = draw_set(tmp_path / "other", [draw_scene(CAR, SKY)], seed=90)
    report, _ = evaluate(tell(other, [(1, 4)]), other, MatchingConfig(names=names))
    assert "4 pictures of set" in report.summary.matching.fitted_on
    # The car was called cluster 1, an animal on the other set: the sky is right and the car is not.
    assert report.summary.panoptic["pq_things"].value == 0.0
    assert report.summary.panoptic["pq_stuff"].value == 100.0


def test_scoring_the_photos_that_were_fitted_is_refused_before_any_is_segmented(truth: GroundTruthDataset) -> None:
    source = tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)])
    names = fit_mapping(source, truth, MatchingConfig())
    source.asked = 0
    part = replace(truth, images=truth.images[1:3])
    with pytest.raises(ConfigError, match="fitted on 2 of the 2 photos"):
        evaluate(source, part, MatchingConfig(names=names))
    assert source.asked == 0
    report, _ = evaluate(source, part, MatchingConfig(names=names, is_same_set=True))
    assert report.summary.matching.evaluated_on_fit_set
    assert "2 of the scored pictures are among them" in report.summary.matching.fitted_on


def test_names_for_other_clusters_or_categories_are_refused(truth: GroundTruthDataset) -> None:
    source = tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)])
    names = fit_mapping(source, truth, MatchingConfig())
    with pytest.raises(ConfigError, match="for 7 thing and 3 stuff clusters, there are 2 and 3"):
        evaluate(source, truth, MatchingConfig(names=replace(names, thing_clusters=7)))
    renamed = replace(truth, taxonomy=replace(truth.taxonomy, names=("animal", "vehicle", "sky")))
    with pytest.raises(ConfigError, match="4 categories, the set has 3"):
        evaluate(source, renamed, MatchingConfig(names=names))


@pytest.mark.parametrize("method", ["majority", "assignment", "cups", "votes"])
def test_every_method_finds_names_that_are_plain(truth: GroundTruthDataset, method: str) -> None:
    plan = MatchingConfig(method=method)  # type: ignore[arg-type]  # every one is a Method
    report, _ = evaluate(tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)]), truth, plan)
    assert report.summary.panoptic["pq"].value == 100.0
    assert report.summary.matching.method == method


def test_one_to_one_leaves_the_second_cluster_of_a_category_without_a_name(truth: GroundTruthDataset) -> None:
    source = tell(truth, [(1, 3), (1, 5), (2, 4), (2, 4)])
    one, _ = evaluate(source, truth, MatchingConfig(method="assignment", is_same_set=True))
    many, _ = evaluate(source, truth, MatchingConfig(method="cups", is_same_set=True))
    assert (one.summary.matching.unmatched_clusters, many.summary.matching.unmatched_clusters) == (1, 0)
    assert one.summary.panoptic["pq"].value < many.summary.panoptic["pq"].value == 100.0


def test_a_detection_below_the_vote_threshold_does_not_vote(truth: GroundTruthDataset) -> None:
    source = ToldSource(truth, [draw_scene(1, 3)] * 4, scores=[0.9, 0.1, 0.9, 0.1])
    comparisons = evaluate_all(source, truth)
    tables = count_cooccurrences(comparisons, label_spaces(source, truth), VoteThresholds(score=0.4))
    assert tables.votes[1].tolist() == [1, 1, 0, 0]
    assert tables.votes[3, 2:].sum() == 4


def test_parts_of_a_set_that_two_processes_compared_score_as_the_whole(truth: GroundTruthDataset) -> None:
    source = tell(truth, [(1, 5), (1, 3), (2, 4), (2, 4)])
    first = [evaluate_image(each, truth, source) for each in truth.images[:2]]
    second = [evaluate_image(each, truth, source) for each in truth.images[2:]]
    assert (
        compute_report(first + second, source, truth, MatchingConfig())[0]
        == evaluate(source, truth, MatchingConfig())[0]
    )
    spaces, thresholds = label_spaces(source, truth), VoteThresholds()
    joined = count_cooccurrences(first, spaces, thresholds) + count_cooccurrences(second, spaces, thresholds)
    whole = count_cooccurrences(first + second, spaces, thresholds)
    assert all(np.array_equal(vars(joined)[key], vars(whole)[key]) for key in vars(whole))


def test_one_picture_is_too_few_to_match_clusters_on_others(truth: GroundTruthDataset) -> None:
    with pytest.raises(LabelStoreError, match="holds 1 pictures"):
        evaluate(
            tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)]), replace(truth, images=truth.images[:1]), MatchingConfig()
        )


def test_pictures_are_ranked_by_their_own_quality(truth: GroundTruthDataset) -> None:
    report, _ = evaluate(tell(truth, [(1, 3), (1, 3), (2, 4), (1, 3)]), truth, MatchingConfig(is_same_set=True))
    assert [each.quality for each in report.images] == [100.0, 100.0, 100.0, 0.0]
    assert report.images[0].file == "1.png"


def test_a_label_of_another_size_than_its_photo_is_refused(truth: GroundTruthDataset) -> None:
    source = ToldSource(truth, [np.ones((SIDE, SIDE + 1), int)] * 4)
    with pytest.raises(LabelStoreError, match=r"1\.png has the shape \(40, 41\)"):
        evaluate(source, truth, MatchingConfig())


@pytest.mark.parametrize(("kind", "groups"), [("semantic", 0), ("masks", 4), ("boxes", 2)])
def test_a_set_that_knows_less_is_scored_for_what_it_knows(truth: GroundTruthDataset, kind: str, groups: int) -> None:
    known = replace(truth, kind=kind)  # type: ignore[arg-type]  # every one is a Kind
    if kind != "semantic":
        known = replace(known, images=tuple(replace(each, annotation=ObjectsAlone(each)) for each in truth.images))
    report, _ = evaluate(tell(truth, [(1, 3), (1, 3), (2, 4), (2, 4)]), known, MatchingConfig())
    assert report.summary.panoptic == {}
    assert len(report.summary.instance) == groups
    if kind == "semantic":
        assert report.summary.semantic["miou"].value == 100.0
    else:
        assert report.summary.semantic == {}
        assert report.summary.instance["named_box"].headline["ap"].value == 100.0
        assert {each.name: each.ap for each in report.classes if each.ap is not None} == {
            "animal": 100.0, "vehicle": 100.0,
        }  # fmt: skip


class ObjectsAlone:
    """A picture's label without its map."""

    files = ()

    def __init__(self, picture: object) -> None:
        self._whole = picture.annotation  # type: ignore[attr-defined]

    def read(self, height: int, width: int) -> object:
        return replace(self._whole.read(height, width), label_map=None)
