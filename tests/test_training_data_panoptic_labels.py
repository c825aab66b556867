import numpy as np

from training.data.panoptic_labels import merge_panoptic


def draw(*boxes: tuple[slice, slice]) -> np.ndarray:
    masks = np.zeros((len(boxes), 10, 10), bool)
    for mask, box in zip(masks, boxes, strict=True):
        mask[box] = True
    return masks


def category_map(panoptic: object) -> np.ndarray:
    return np.vectorize({0: 0, **panoptic.categories}.get)(panoptic.label_map)  # type: ignore[attr-defined]


def test_a_small_mask_lies_on_a_large_one_whatever_their_order() -> None:
    masks = draw((slice(4, 6), slice(4, 6)), (slice(2, 8), slice(2, 8)))
    categories = category_map(merge_panoptic(masks, [3, 2], np.ones((10, 10), np.int32), thing_clusters=5))
    assert categories[5, 5] == 3
    assert categories[2, 2] == 2
    assert categories[0, 0] == 6


def test_a_mask_wholly_covered_by_smaller_ones_is_gone() -> None:
    masks = draw((slice(0, 10), slice(0, 10)), (slice(0, 10), slice(0, 5)), (slice(0, 10), slice(5, 10)))
    labelled = merge_panoptic(masks, [1, 2, 3], np.zeros((10, 10), np.int32), thing_clusters=5)
    assert sorted(labelled.categories.values()) == [2, 3]


def test_stuff_mostly_under_things_is_left_void() -> None:
    stuff = np.ones((10, 10), np.int32)
    stuff[:, 8:] = 2
    masks = draw((slice(0, 10), slice(0, 7)))  # covers 87.5 % of cluster 1, none of cluster 2
    categories = category_map(merge_panoptic(masks, [1], stuff, thing_clusters=5))
    assert (categories[:, 7] == 0).all()
    assert (categories[:, 8:] == 7).all()


def test_a_photo_without_masks_is_all_stuff() -> None:
    labelled = merge_panoptic(np.zeros((0, 4, 4), bool), [], np.full((4, 4), 3, np.int32), thing_clusters=5)
    assert labelled.categories == {3: 8}
    assert (labelled.label_map == 3).all()


def test_the_improved_rule_ignores_thing_like_stuff_where_no_mask_is() -> None:
    stuff = np.ones((10, 10), np.int32)
    stuff[:, 6:] = 2
    masks = draw((slice(0, 10), slice(0, 4)))  # covers two thirds of cluster 1
    published = category_map(merge_panoptic(masks, [1], stuff, thing_clusters=5))
    assert published[0].tolist() == [1] * 4 + [6] * 2 + [7] * 4
    improved = category_map(merge_panoptic(masks, [1], stuff, thing_clusters=5, thing_like=frozenset({1})))
    assert improved[0].tolist() == [1] * 4 + [0] * 2 + [7] * 4


def test_where_stuff_is_none_there_is_void() -> None:
    stuff = np.zeros((10, 10), np.int32)
    stuff[:, 8:] = 3
    labelled = merge_panoptic(draw((slice(0, 2), slice(0, 2))), [2], stuff, thing_clusters=5)
    categories = category_map(labelled)
    assert (categories[0, 0], categories[5, 5], categories[5, 9]) == (2, 0, 8)
    assert 0 not in labelled.categories
