from pathlib import Path

import pytest
from fake_source import ToldSource, draw_scene, draw_set

from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.matching.class_mapping import MatchingConfig
from training.evaluation.paired_comparison import compare_predictors

CAT, CAR, WALL, SKY = 17, 3, 171, 187
RIGHT = [(1, 3), (1, 3), (2, 4), (2, 4)]


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruthDataset:
    scenes = [draw_scene(CAT, WALL), draw_scene(CAT, WALL), draw_scene(CAR, SKY), draw_scene(CAR, SKY)]
    return draw_set(tmp_path / "set", scenes)


def tell(truth: GroundTruthDataset, pairs: list[tuple[int, int]]) -> tuple[ToldSource, MatchingConfig]:
    return ToldSource(truth, [draw_scene(*each) for each in pairs]), MatchingConfig()


def test_a_source_is_as_good_as_itself_whatever_the_pictures(truth: GroundTruthDataset) -> None:
    found = compare_predictors(tell(truth, RIGHT), tell(truth, RIGHT), truth)
    assert set(found) == {"PQ", "PQ things", "PQ stuff", "mIoU", "accuracy", "AP", "AP50", "AP75", "AR100"}
    for each in found.values():
        assert (each.new, each.old) == (100.0, 100.0)
        assert (each.more.value, each.more.low, each.more.high) == (0.0, 0.0, 0.0)


def test_what_one_finds_and_the_other_does_not_is_the_difference_with_its_interval(truth: GroundTruthDataset) -> None:
    # Without its thing the second finds stuff alone; cluster 3 lies where the things are, too.
    found = compare_predictors(tell(truth, RIGHT), tell(truth, [(3, 3), (3, 3), (4, 4), (4, 4)]), truth)
    assert (found["PQ things"].new, found["PQ things"].old, found["PQ things"].more.value) == (100.0, 0.0, 100.0)
    assert found["AP"].more.low == 100.0
    assert found["accuracy"].old == 75.0  # a thing covers a quarter of each picture
    assert found["PQ stuff"].old == 75.0  # and its stuff is three quarters of what is drawn


def test_the_interval_is_of_the_difference_and_not_of_the_figures(truth: GroundTruthDataset) -> None:
    # The first picture's wall is called sky by both: each figure varies from draw to draw, the difference does not.
    wrong = [(1, 4), (1, 3), (2, 4), (2, 4)]
    found = compare_predictors(tell(truth, wrong), tell(truth, wrong), truth)["PQ"]
    assert found.new < 100.0
    assert (found.more.low, found.more.high) == (0.0, 0.0)
