import numpy as np

from training.evaluation.overlap import compute_overlap, map_predicted, merge_ground_truth_stuff, merge_things

PREDICTED = np.array([[5, 5, 9, 9], [5, 5, 9, 0]], np.int32)
TRUE = np.array([[1, 1, 1, 2], [3, 3, 2, 2]], np.int32)


def test_shared_pixels_are_counted_with_void_first() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 1})
    assert overlap.pixels.tolist() == [[0, 0, 1, 0], [0, 2, 0, 2], [0, 1, 2, 0]]


def test_an_id_that_is_not_listed_is_void() -> None:
    overlap = compute_overlap(PREDICTED, {9: 2}, TRUE, {2: 1})
    assert overlap.pixels.tolist() == [[4, 1], [1, 2]]


def test_no_segments_at_all_is_all_void() -> None:
    assert compute_overlap(PREDICTED, {}, TRUE, {}).pixels.tolist() == [[8]]


def test_true_stuff_of_one_category_becomes_one_segment_and_things_stay_apart() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 1})
    assert merge_ground_truth_stuff(overlap, things=1).pixels.tolist() == [[0, 0, 1], [0, 2, 2], [0, 1, 2]]
    assert merge_ground_truth_stuff(overlap, things=2).pixels.shape == (3, 4)


def test_a_predicted_class_without_a_name_becomes_void() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 1})
    renamed = map_predicted(overlap, np.array([-1, -1, 0]), merged_from=9)
    assert renamed.predicted.tolist() == [0]
    assert renamed.pixels.tolist() == [[0, 2, 1, 2], [0, 1, 2, 0]]


def test_the_look_up_is_done_once_and_not_chained() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 1})
    assert map_predicted(overlap, np.array([-1, 2, 1]), merged_from=9).predicted.tolist() == [2, 1]


def test_things_of_every_kind_become_one_class_below_the_stuff() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 2, 3: 3})
    gathered = merge_things(overlap, things=2)
    assert (gathered.predicted.tolist(), gathered.true.tolist()) == ([0, 1], [0, 1, 2])
    assert np.array_equal(gathered.pixels, overlap.pixels)


def test_a_large_id_in_any_order_of_the_list_is_found() -> None:
    predicted = np.full((3, 3), 16_777_215, np.int32)
    overlap = compute_overlap(predicted, {16_777_215: 4, 2: 1}, predicted.T, {7: 0, 16_777_215: 3})
    assert overlap.pixels.tolist() == [[0, 0, 0], [0, 0, 9], [0, 0, 0]]
