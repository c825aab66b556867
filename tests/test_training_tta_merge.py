import math
from dataclasses import replace

import numpy as np
import pytest

from training.self_training.teacher import ViewPredictions
from training.self_training.tta_merge import TtaConsistency, compare, measure_consistency, merge_views

CELLS = 8
Box = tuple[int, int, int, int]


def draw(boxes: list[Box], scores: list[float], clusters: list[int], shown: Box = (0, 8, 0, 8)) -> ViewPredictions:
    """Objects (top, bottom, left, right) that a view is 0.9 sure of, stuff 1 everywhere, 0.6 sure."""
    soft = np.zeros((len(boxes), CELLS, CELLS), np.float32)
    for mask, (top, bottom, left, right) in zip(soft, boxes, strict=True):
        mask[top:bottom, left:right] = 0.9
    inside = np.zeros((CELLS, CELLS), bool)
    inside[shown[0] : shown[1], shown[2] : shown[3]] = True
    chances = np.eye(3, dtype=np.float32)[clusters] * 0.8 + 0.1
    semantic = np.stack([0.4 * inside, 0.6 * inside, 0 * inside]).astype(np.float32)
    return ViewPredictions(
        soft=soft, scores=np.array(scores, np.float32), chances=chances, semantic=semantic, inside=inside
    )


LEFT, LONGER, SHIFTED, RIGHT = (0, 4, 0, 4), (0, 5, 0, 4), (1, 5, 0, 4), (4, 8, 4, 8)
NOTHING = draw([], [], [])


def test_objects_of_several_views_are_averaged_by_their_scores() -> None:
    found = merge_views([draw([LEFT], [0.75], [1]), draw([LONGER], [0.25], [2])])
    assert found.scores.tolist() == [0.75]
    assert found.clusters.tolist() == [2]
    assert found.soft[0, :6, 0].tolist() == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.225, 0.0])


def test_an_object_that_one_of_two_views_finds_is_half_as_sure_again_and_comes_later() -> None:
    found = merge_views([draw([LEFT, RIGHT], [0.8, 0.7], [0, 2]), draw([RIGHT], [0.5], [2])])
    assert found.scores.tolist() == pytest.approx([0.7, 0.6])  # three quarters of 0.8
    assert found.clusters.tolist() == [3, 1]


def test_a_window_that_does_not_show_an_object_takes_nothing_from_it() -> None:
    whole = draw([LEFT], [0.9], [0])
    found = merge_views([whole, whole, draw([], [], [], shown=(4, 8, 4, 8))])
    assert found.scores.tolist() == pytest.approx([0.9])


def test_what_a_window_alone_finds_counts_less_than_what_the_whole_photo_shows() -> None:
    found = merge_views([NOTHING, NOTHING, draw([RIGHT], [0.9], [0], shown=(3, 8, 3, 8))])
    assert found.scores.tolist() == pytest.approx([0.8 * 0.9 * (1 + 1 / 3) / 2])


def test_an_object_that_a_window_cuts_off_is_left_out() -> None:
    found = merge_views([NOTHING, NOTHING, draw([LEFT], [0.9], [0], shown=(0, 8, 2, 8))])
    assert len(found.scores) == 0
    assert found.soft.shape == (0, CELLS, CELLS)


def test_of_two_that_nearly_are_one_in_one_view_the_surer_stays_and_a_rival_decays() -> None:
    found = merge_views([draw([LEFT, LONGER, RIGHT], [0.4, 0.8, 0.6], [0, 1, 2])])
    assert found.scores.tolist() == pytest.approx([0.8, 0.6])
    assert found.clusters.tolist() == [2, 3]
    rivals = merge_views([draw([LEFT, SHIFTED], [0.4, 0.8], [0, 1])])  # IoU 12 / 20
    assert rivals.scores.tolist() == pytest.approx([0.8, 0.4 * math.exp(-2.0 * 0.6**2)])


def test_what_is_hardly_sure_is_not_kept() -> None:
    assert len(merge_views([draw([LEFT], [0.12], [0]), NOTHING]).scores) == 0


def test_stuff_is_the_mean_of_the_views_that_show_a_cell() -> None:
    whole = draw([], [], [])
    window = replace(whole, semantic=np.zeros_like(whole.semantic))
    window.semantic[0, :, :4] = 1.0
    found = merge_views([whole, window])
    assert found.semantic[0].tolist() == [0] * 4 + [1] * 4
    assert found.certainty[0].tolist() == pytest.approx([0.7] * 4 + [0.6] * 4)


def test_steadiness_by_hand() -> None:
    whole = draw([LEFT, RIGHT], [0.6, 0.2], [0, 0])
    whole.semantic[:] = np.array([1.0, 0.0, 0.0])[:, None, None]
    mirrored = draw([SHIFTED, RIGHT], [0.9, 0.05], [0, 0])  # IoU 12 / 20; too unsure to count
    window = draw([RIGHT], [0.3], [0], shown=(4, 8, 4, 8))
    steadiness = measure_consistency([whole, mirrored, window])
    assert steadiness.flip == pytest.approx(0.6 * 0.6 / 0.8)
    assert steadiness.scale == pytest.approx(1.0)  # of the object that the window shows
    assert steadiness.covered == pytest.approx(16 / 64)


def test_where_nothing_is_found_there_is_nothing_to_measure_but_cover() -> None:
    steadiness = measure_consistency([draw([], [], []), draw([LEFT], [0.9], [0]), draw([], [], [])])
    assert math.isnan(steadiness.flip)
    assert steadiness.covered == 1.0
    mean = TtaConsistency.average([steadiness, TtaConsistency(flip=0.5, scale=math.nan, covered=0.5)])
    assert (mean.flip, mean.covered) == (0.5, 0.75)
    assert math.isnan(mean.scale)


def test_a_fall_is_told_and_less_than_the_tolerance_is_none() -> None:
    before, after = (
        TtaConsistency(flip=0.5, scale=0.5, covered=0.5),
        TtaConsistency(flip=0.4, scale=0.499, covered=math.nan),
    )
    assert after.list_falls(before, 0.005) == ["flip 0.500 to 0.400", "covered 0.500 to nan"]
    assert before.list_falls(after, 0.005) == []


def test_overlaps_by_hand() -> None:
    masks = draw([LEFT, SHIFTED], [1, 1], [0, 0]).hard
    assert compare(masks, masks[:1]).ravel().tolist() == pytest.approx([1.0, 12 / 20])
    assert compare(masks[:0], masks).shape == (0, 2)
