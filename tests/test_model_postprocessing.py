"""Post-processing of raw outputs to panoptic, semantic and instance segmentations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import make_contract

from model.contract import Contract, InputSize, RawOutputs, Task, Thresholds
from model.embeddings import Category
from model.images import plan_letterbox
from model.postprocessing.panoptic import (
    Segmentation,
    make_postprocessor,
    merge_categories,
    postprocess,
    select_segments,
)

THINGS = 3
KEEP_ALL = Thresholds(score_threshold=0.0, min_stuff_area_fraction=0.0)
SPLIT = replace(KEEP_ALL, min_component_area_fraction=0.1)


def draw_contract(side_px: int = 8, stuff: int = 2, **more: Any) -> Contract:
    return make_contract(THINGS, stuff, side_px, **{"stride_px": 1, **more})


def draw_mask(rows: slice, columns: slice, side: int = 8) -> np.ndarray:
    mask = np.zeros((side, side), np.float32)
    mask[rows, columns] = 0.9
    return mask


def draw_logits(labels: Any, count: int = 3) -> np.ndarray:
    """Return semantic logits in which the label of each cell leads by ten."""
    return np.stack([10.0 * (np.asarray(labels) == label) for label in range(count)]).astype(np.float32)


def draw_raw(detections: list[tuple[float, int, np.ndarray]], labels: Any = None, logits: Any = None) -> RawOutputs:
    """Return outputs with these detections (score, cluster from 0, mask); semantic labels default to "things"."""
    scores, clusters, masks = zip(*detections, strict=True) if detections else ((), (), np.zeros((0, 8, 8)))
    return RawOutputs(
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        boxes=np.zeros((len(scores), 4), np.float32),
        masks=np.array(masks, np.float32),
        semantic=draw_logits(np.zeros((8, 8), int) if labels is None else labels) if logits is None else logits,
    )


def segment(
    raw: RawOutputs,
    task: Task,
    thresholds: Thresholds = KEEP_ALL,
    height: int = 8,
    width: int = 8,
    contract: Contract | None = None,
) -> Segmentation:
    letterbox = plan_letterbox(height, width, [InputSize.square(8)], 1)
    return postprocess(raw, letterbox, contract or draw_contract(), task, thresholds)


def list_segments(segmentation: Segmentation) -> list[tuple[int, int, bool]]:
    return [(each.id, each.cluster, each.is_thing) for each in segmentation.segments]


def stripe(first: int, last: int) -> np.ndarray:
    """Return a mask of the columns first..last-1 of the top row."""
    return draw_mask(slice(0, 1), slice(first, last))


def test_detections_are_numbered_by_descending_score_and_clusters_from_one() -> None:
    raw = draw_raw([(0.5, 0, stripe(0, 2)), (0.9, 2, stripe(2, 4)), (0.7, 1, stripe(4, 6)), (0.5, 1, stripe(6, 8))])
    result = segment(raw, "panoptic")
    assert list_segments(result) == [(1, 3, True), (2, 2, True), (3, 1, True), (4, 2, True)]
    assert result.label_map[0].tolist() == [3, 3, 1, 1, 2, 2, 4, 4]
    assert [each.score for each in result.segments] == pytest.approx([0.9, 0.7, 0.5, 0.5], abs=1e-7)  # float32


def test_the_score_threshold_is_inclusive() -> None:
    raw = draw_raw([(0.5, 0, stripe(0, 2)), (0.4999, 1, stripe(4, 6))])
    assert list_segments(segment(raw, "panoptic", Thresholds(score_threshold=0.5))) == [(1, 1, True)]


def test_a_mask_covered_beyond_the_overlap_threshold_is_dropped() -> None:
    better, half, three_quarters = stripe(0, 4), stripe(2, 6), stripe(1, 5)
    raw = draw_raw([(0.9, 0, better), (0.8, 1, half), (0.7, 2, three_quarters)])
    result = segment(raw, "panoptic")
    assert list_segments(result) == [(1, 1, True), (2, 2, True)]
    assert result.label_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    strict = segment(raw, "panoptic", replace(KEEP_ALL, overlap_threshold=0.49))
    assert list_segments(strict) == [(1, 1, True)]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_detections_with_nan_scores_are_dropped(task: Task) -> None:
    raw = draw_raw(
        [(np.nan, 0, stripe(0, 2)), (0.9, 1, stripe(2, 4)), (np.nan, 2, stripe(4, 6)), (0.4, 2, stripe(6, 8))]
    )
    assert [each.cluster for each in segment(raw, task).segments] == [2, 3]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_empty_masks_nan_masks_and_padding_give_no_segments(task: Task) -> None:
    empty, unknown = np.zeros((8, 8), np.float32), np.full((8, 8), np.nan, np.float32)
    for detections in ([], [(0.9, 0, empty), (0.8, 1, unknown), (0.0, 2, stripe(0, 8))]):
        for thresholds in (KEEP_ALL, SPLIT):
            result = segment(draw_raw(detections), task, thresholds)
            assert result.segments == ()
            assert result.label_map.tolist() == np.zeros((8, 8), int).tolist()


def test_the_mask_threshold_is_exclusive() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[0, :3] = (0.5, 0.51, 1.0)
    assert segment(draw_raw([(0.9, 0, mask)]), "panoptic").label_map[0, :3].tolist() == [0, 1, 1]


def test_stuff_fills_pixels_without_things() -> None:
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = 2
    result = segment(draw_raw([(0.9, 0, stripe(3, 6))], labels), "panoptic")
    assert list_segments(result) == [(1, 1, True), (2, THINGS + 2, False)]
    assert result.label_map[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert result.label_map[1].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]


def test_small_stuff_becomes_void() -> None:
    labels = np.zeros((8, 8), int)
    labels[0, :4], labels[7, :3] = 1, 2
    result = segment(draw_raw([], labels), "panoptic", Thresholds(min_stuff_area_fraction=4 / 64))
    assert list_segments(result) == [(1, THINGS + 1, False)]
    assert not result.label_map[7].any()
    raw = draw_raw([(0.9, 0, stripe(0, 1))], labels)  # the thing covers one of the four pixels
    thing_only = segment(raw, "panoptic", Thresholds(min_stuff_area_fraction=4 / 64))
    assert [each.is_thing for each in thing_only.segments] == [True]


def test_the_score_of_stuff_is_its_mean_probability() -> None:
    logits = np.zeros((3, 8, 8), np.float32)
    logits[0] = -50.0
    logits[2, :, :4], logits[2, :, 4:] = np.log(3.0), np.log(7.0)  # 3/4 and 7/8 against label 1
    (stuff,) = segment(draw_raw([], logits=logits), "panoptic").segments
    assert stuff.score == pytest.approx((0.75 + 0.875) / 2, abs=1e-6)  # float32


def test_semantic_merges_instances_of_a_cluster() -> None:
    labels = np.zeros((8, 8), int)
    labels[7, 7] = 1
    raw = draw_raw([(0.9, 1, stripe(0, 1)), (0.8, 0, stripe(1, 3)), (0.5, 1, stripe(3, 6))], labels)
    result = segment(raw, "semantic", Thresholds(score_threshold=0.0, min_stuff_area_fraction=0.5))
    assert list_segments(result) == [(1, 1, True), (2, 2, True), (3, THINGS + 1, False)]
    assert result.label_map[0].tolist() == [2, 1, 1, 2, 2, 2, 0, 0]
    assert result.label_map[7, 7] == 3  # small stuff is kept
    # One pixel at 0.9 and three at 0.5; float32.
    assert result.segments[1].score == pytest.approx((0.9 + 3 * 0.5) / 4, abs=1e-6)


def test_semantic_fills_void_with_low_scoring_objects_best_first() -> None:
    labels = np.zeros((8, 8), int)
    labels[0, 6:] = 1
    sure, low, lower, too_low = (0.9, 0, stripe(0, 2)), (0.5, 1, stripe(1, 4)), (0.3, 0, stripe(3, 7)), 0.1999
    raw = draw_raw([sure, low, lower, (too_low, 2, draw_mask(slice(0, 2), slice(0, 8)))], labels)
    thresholds = Thresholds(score_threshold=0.8, min_stuff_area_fraction=0.0)
    result = segment(raw, "semantic", thresholds)
    assert list_segments(result) == [(1, 1, True), (2, 2, True), (3, THINGS + 1, False)]
    assert result.label_map[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]  # stuff stays stuff
    assert not result.label_map[1].any()
    assert result.segments[0].score == pytest.approx((2 * 0.9 + 2 * 0.3) / 4, abs=1e-6)  # float32
    assert segment(raw, "panoptic", thresholds).label_map[0].tolist() == [1, 1, 0, 0, 0, 0, 2, 2]
    assert len(segment(raw, "instance", thresholds).segments) == 1


def test_semantic_keeps_visible_pixels_of_covered_objects() -> None:
    raw = draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 1, stripe(1, 5))])
    result = segment(raw, "semantic", Thresholds(score_threshold=0.5))
    assert result.label_map[0].tolist() == [1, 1, 1, 1, 2, 0, 0, 0]
    assert len(segment(raw, "panoptic", Thresholds(score_threshold=0.5)).segments) == 1


def test_clusters_of_a_category_are_merged_but_things_of_a_panoptic_map_are_not() -> None:
    labels = np.zeros((8, 8), int)
    labels[6], labels[7] = 1, 2
    raw = draw_raw([(0.9, 0, stripe(0, 1)), (0.5, 2, stripe(1, 4)), (0.4, 1, stripe(4, 5))], labels)
    dog, grass = Category(id=9, name="dog"), Category(id=5, name="grass")
    contract = draw_contract(categories={1: dog, 3: dog, 4: grass, 5: grass})
    semantic = merge_categories(segment(raw, "semantic", contract=contract), "semantic")
    assert [(each.id, each.cluster, each.merged_clusters) for each in semantic.segments] == [
        (1, 3, (3, 1)),
        (2, 2, ()),
        (3, 4, (4, 5)),
    ]
    assert semantic.label_map[[0, 6, 7]].tolist() == [[1, 1, 1, 1, 2, 0, 0, 0], [3] * 8, [3] * 8]
    assert semantic.segments[0].score == pytest.approx((0.9 + 3 * 0.5) / 4, abs=1e-6)  # float32
    panoptic = merge_categories(segment(raw, "panoptic", contract=contract), "panoptic")
    assert [(each.cluster, each.merged_clusters) for each in panoptic.segments] == [
        (1, ()),
        (3, ()),
        (2, ()),
        (4, (4, 5)),
    ]
    instances = segment(raw, "instance", contract=contract)
    assert merge_categories(instances, "instance") is instances


def test_instances_have_complete_masks_and_the_best_one_is_shown() -> None:
    result = segment(draw_raw([(0.6, 1, stripe(2, 6)), (0.9, 0, stripe(0, 4)), (0.5, 2, stripe(1, 3))]), "instance")
    assert list_segments(result) == [(1, 1, True), (2, 2, True), (3, 3, True)]
    assert result.label_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert [(mask.top, mask.left, mask.bits.tolist()) for mask in result.masks] == [
        (0, 0, [[True] * 4]),
        (0, 2, [[True] * 4]),
        (0, 1, [[True] * 2]),
    ]


def test_components_become_segments_and_small_ones_are_dropped() -> None:
    mask = (
        draw_mask(slice(0, 2), slice(0, 5)) + draw_mask(slice(4, 6), slice(0, 2)) + draw_mask(slice(7, 8), slice(7, 8))
    )
    result = segment(
        draw_raw([(0.9, 0, mask)]), "panoptic", replace(KEEP_ALL, min_component_area_fraction=0.3)
    )  # of 10, 4 and 1 cells
    assert [(each.id, each.cluster) for each in result.segments] == [(1, 1), (2, 1)]
    assert [each.score for each in result.segments] == pytest.approx([0.9, 0.9])
    assert result.label_map[:2, :5].tolist() == [[1] * 5] * 2
    assert result.label_map[4:6, :2].tolist() == [[2] * 2] * 2
    assert result.label_map[7, 7] == 0


def test_outputs_in_the_padding_are_ignored() -> None:
    labels = np.full((8, 8), 2)
    labels[:4] = 0
    below = draw_mask(slice(4, 8), slice(0, 8))
    result = segment(draw_raw([(0.9, 0, below)], labels), "panoptic", height=4, width=8)
    assert result.segments == ()
    assert result.label_map.shape == (4, 8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 47), (100, 63)])
def test_segmentations_have_the_image_size_with_edges_within_a_pixel(height: int, width: int) -> None:
    letterbox = plan_letterbox(height, width, [InputSize.square(32)], 4)
    middle = letterbox.map_width // 2
    labels = np.ones((8, 8), int)
    labels[:, middle:] = 2
    raw = draw_raw([(0.9, 0, np.where(labels == 2, 1.0, 0.0))], labels)
    contract = draw_contract(side_px=32, stride_px=4)
    edge = middle * width / letterbox.map_width
    for task in ("panoptic", "semantic", "instance"):
        label_map = postprocess(raw, letterbox, contract, task, KEEP_ALL).label_map
        assert label_map.shape == (height, width)
        thing = 1 if task != "semantic" else label_map[0, -1]
        assert abs(int((label_map[height // 2] != thing).sum()) - edge) <= 1.0


def test_box_masks_are_pasted_at_the_scaled_box() -> None:
    """The image is twice as large as the network input, so the box doubles as well."""
    mask = np.full((28, 28), 0.9, np.float32)
    mask[:, 14:] = 0.0
    raw = replace(
        draw_raw([(0.9, 0, mask), (0.8, 1, mask), (0.7, 1, mask), (0.6, 1, mask)]),
        # The second leaves the image, the third lies outside, the fourth has no area.
        boxes=np.array([[8, 4, 24, 20], [-50, 28, 60, 90], [40, 40, 60, 60], [9, 9, 9, 9]], np.float32),
    )
    contract = draw_contract(side_px=32, stride_px=4, box_mask_size=28)
    letterbox = plan_letterbox(64, 64, [InputSize.square(32)], 4)
    instances = postprocess(raw, letterbox, contract, "instance", KEEP_ALL)
    assert list_segments(instances) == [(1, 1, True), (2, 2, True)]
    first, second = (np.argwhere(instances.label_map == segment) for segment in (1, 2))
    assert (first.min(0).tolist(), first.max(0).tolist()) == ([8, 16], [39, 31])
    assert (second.min(0).tolist(), second.max(0).tolist()) == ([56, 0], [63, 31])  # half of the box that is left


def test_without_stuff_clusters_the_rest_is_void() -> None:
    raw = draw_raw([(0.9, 0, draw_mask(slice(2, 4), slice(2, 4)))], logits=np.zeros((1, 8, 8), np.float32))
    result = postprocess(
        raw, plan_letterbox(8, 8, [InputSize.square(8)], 1), draw_contract(stuff=0), "panoptic", KEEP_ALL
    )
    assert list_segments(result) == [(1, 1, True)]
    assert int((result.label_map == 0).sum()) == 60


@pytest.mark.parametrize("duplicate", [0.5, 1.0])
def test_duplicates_across_clusters_are_dropped_above_the_iou_threshold(duplicate: float) -> None:
    better, same, other = stripe(0, 4), stripe(1, 4), stripe(3, 7)  # IoU with the first: 3/4 and 1/7
    raw = draw_raw([(0.9, 0, better), (0.8, 1, same), (0.7, 2, other)])
    result = segment(raw, "instance", replace(KEEP_ALL, duplicate_iou_threshold=duplicate))
    assert [each.cluster for each in result.segments] == ([1, 3] if duplicate < 1.0 else [1, 2, 3])


def test_a_shared_postprocessor_gives_the_same_segmentations() -> None:
    labels = np.zeros((8, 8), int)
    labels[:, 4:], labels[7, :2] = 1, 2
    raw = draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 0, stripe(3, 7))], labels)
    thresholds = Thresholds(score_threshold=0.0, min_stuff_area_fraction=4 / 64)
    letterbox = plan_letterbox(8, 8, [InputSize.square(8)], 1)
    run_task = make_postprocessor(raw, letterbox, draw_contract(), thresholds)
    tasks: tuple[Task, ...] = ("semantic", "instance", "panoptic", "semantic")
    for task in tasks:
        alone, shared = segment(raw, task, thresholds), run_task(task)
        assert shared.segments == alone.segments
        np.testing.assert_array_equal(shared.label_map, alone.label_map)


def test_selected_segments_keep_their_ids_and_others_become_void() -> None:
    labels = np.zeros((8, 8), int)
    labels[1:] = 1
    raw = draw_raw([(0.9, 0, stripe(0, 2)), (0.8, 2, stripe(4, 6))], labels)
    result = select_segments(segment(raw, "panoptic"), lambda each: each.cluster in (3, THINGS + 1))
    assert list_segments(result) == [(2, 3, True), (3, THINGS + 1, False)]
    assert result.label_map[0].tolist() == [0, 0, 0, 0, 2, 2, 0, 0]
    assert np.unique(result.label_map[1:]).tolist() == [3]
    instances = select_segments(segment(raw, "instance"), lambda each: each.cluster == 3)
    assert [mask.left for mask in instances.masks] == [4]
    assert select_segments(instances, lambda each: False).segments == ()


def test_more_than_255_segments_are_supported() -> None:
    detections = [(0.9, 0, draw_mask(slice(0, 1), slice(0, 1)))] * 300
    letterbox = plan_letterbox(8, 8, [InputSize.square(8)], 1)
    result = postprocess(draw_raw(detections), letterbox, draw_contract(), "instance", KEEP_ALL)
    assert [each.id for each in result.segments] == list(range(1, 301))
    assert result.label_map[0, 0] == 1
