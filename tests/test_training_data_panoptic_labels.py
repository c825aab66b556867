import numpy as np

from training.data.panoptic_labels import (
    PanopticLabel,
    find_thing_like_stuff,
    merge_panoptic,
    remove_overlaps,
)


def draw(*boxes: tuple[slice, slice]) -> np.ndarray:
    masks = np.zeros((len(boxes), 10, 10), bool)
    for mask, box in zip(masks, boxes, strict=True):
        mask[box] = True
    return masks


def category_map(label: PanopticLabel) -> np.ndarray:
    return np.vectorize({0: 0, **label.categories}.get)(label.label_map)


def test_small_masks_are_painted_over_large_ones_in_any_order() -> None:
    masks = draw((slice(4, 6), slice(4, 6)), (slice(2, 8), slice(2, 8)))
    categories = category_map(merge_panoptic(masks, [3, 2], np.ones((10, 10), np.int32), thing_clusters=5))
    assert (categories[5, 5], categories[2, 2], categories[0, 0]) == (3, 2, 6)


def test_a_mask_covered_by_smaller_ones_has_no_segment() -> None:
    masks = draw((slice(0, 10), slice(0, 10)), (slice(0, 10), slice(0, 5)), (slice(0, 10), slice(5, 10)))
    label = merge_panoptic(masks, [1, 2, 3], np.zeros((10, 10), np.int32), thing_clusters=5)
    assert sorted(label.categories.values()) == [2, 3]


def test_stuff_covered_by_more_than_70_percent_is_left_void() -> None:
    stuff = np.ones((10, 10), np.int32)
    stuff[:, 8:] = 2
    masks = draw((slice(0, 10), slice(0, 7)))  # covers 87.5 % of cluster 1, none of cluster 2
    categories = category_map(merge_panoptic(masks, [1], stuff, thing_clusters=5))
    assert (categories[:, 7] == 0).all()
    assert (categories[:, 8:] == 7).all()


def test_a_photo_without_masks_is_all_stuff() -> None:
    label = merge_panoptic(np.zeros((0, 4, 4), bool), [], np.full((4, 4), 3, np.int32), thing_clusters=5)
    assert label.categories == {3: 8}
    assert (label.label_map == 3).all()


def test_thing_like_stuff_is_void_outside_masks() -> None:
    stuff = np.ones((10, 10), np.int32)
    stuff[:, 6:] = 2
    masks = draw((slice(0, 10), slice(0, 4)))  # covers two thirds of cluster 1
    assert category_map(merge_panoptic(masks, [1], stuff, 5))[0].tolist() == [1] * 4 + [6] * 2 + [7] * 4
    dropped = merge_panoptic(masks, [1], stuff, 5, thing_like=frozenset({1}))
    assert category_map(dropped)[0].tolist() == [1] * 4 + [0] * 2 + [7] * 4


def test_only_the_rule_drop_thing_like_drops_stuff_that_lies_in_masks() -> None:
    stuff_in_masks = np.array([0.6, 0.5, 0.9])
    assert find_thing_like_stuff(stuff_in_masks, 0.5, "drop-thing-like") == {1, 3}
    assert find_thing_like_stuff(stuff_in_masks, 0.5, "u2seg") == set()


def test_pixels_without_stuff_are_void() -> None:
    stuff = np.zeros((10, 10), np.int32)
    stuff[:, 8:] = 3
    label = merge_panoptic(draw((slice(0, 2), slice(0, 2))), [2], stuff, thing_clusters=5)
    categories = category_map(label)
    assert (categories[0, 0], categories[5, 5], categories[5, 9]) == (2, 0, 8)
    assert 0 not in label.categories


def test_a_pixel_goes_to_the_first_mask_and_a_mask_that_loses_more_than_half_is_dropped() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 1]]], bool)
    expected = [[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]
    assert remove_overlaps(masks).astype(int).tolist() == expected
    assert remove_overlaps(masks[:0]).shape == (0, 1, 4)
