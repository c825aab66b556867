"""Raw answers drawn by hand become the segments that the paper's merge prescribes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.contract import Contract, InputSize, Task, Thresholds
from model.images import plan_letterbox
from model.network_io import RawOutputs
from model.postprocessing.panoptic import Segmentation, make_postprocessor, postprocess, select_clusters

THINGS = 3
KEEP_ALL = Thresholds(score_threshold=0.0, min_stuff_area_fraction=0.0)


def draw_contract(side_px: int = 8, stride_px: int = 1, stuff: int = 2, detections: int = 4) -> Contract:
    return Contract(
        name="a", version="1", network="n", input_sizes=(InputSize.square(side_px),), stride_px=stride_px,
        max_detections=detections, thing_clusters=THINGS, stuff_clusters=stuff,
    )  # fmt: skip


def draw_mask(rows: slice, columns: slice, side: int = 8) -> np.ndarray:
    mask = np.zeros((side, side), np.float32)
    mask[rows, columns] = 0.9
    return mask


def draw_logits(labels: Any, count: int = 3) -> np.ndarray:
    """Semantic logits in which each cell's label leads by ten."""
    return np.stack([10.0 * (np.asarray(labels) == label) for label in range(count)]).astype(np.float32)


def draw_raw(detections: list[tuple[float, int, np.ndarray]], labels: Any = None, logits: Any = None) -> RawOutputs:
    """Score, cluster from 0 and mask of each detection; semantic labels are all "things" unless given."""
    scores, clusters, masks = zip(*detections, strict=True) if detections else ((), (), np.zeros((0, 8, 8)))
    return RawOutputs(
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        boxes=np.zeros((len(scores), 4), np.float32),
        masks=np.array(masks, np.float32),
        semantic=draw_logits(np.zeros((8, 8), int) if labels is None else labels) if logits is None else logits,
    )


def segment(
    raw: RawOutputs, task: Task, thresholds: Thresholds = KEEP_ALL, height: int = 8, width: int = 8
) -> Segmentation:
    contract = draw_contract()
    return postprocess(raw, plan_letterbox(height, width, [InputSize.square(8)], 1), contract, task, thresholds)


def list_segments(segmentation: Segmentation) -> list[tuple[int, int, bool]]:
    return [(each.id, each.cluster, each.is_thing) for each in segmentation.segments]


def stripe(first: int, last: int) -> np.ndarray:
    """A mask over the columns first..last-1 of the top row."""
    return draw_mask(slice(0, 1), slice(first, last))


def test_detections_are_numbered_by_descending_score_and_clusters_from_one() -> None:
    raw = draw_raw([(0.5, 0, stripe(0, 2)), (0.9, 2, stripe(2, 4)), (0.7, 1, stripe(4, 6))])
    answer = segment(raw, "panoptic")
    assert list_segments(answer) == [(1, 3, True), (2, 2, True), (3, 1, True)]
    assert answer.label_map[0].tolist() == [3, 3, 1, 1, 2, 2, 0, 0]
    assert [each.score for each in answer.segments] == pytest.approx([0.9, 0.7, 0.5], abs=1e-7)  # float32


def test_equal_scores_keep_the_networks_order() -> None:
    answer = segment(draw_raw([(0.5, 2, stripe(0, 2)), (0.5, 0, stripe(4, 6))]), "panoptic")
    assert [each.cluster for each in answer.segments] == [3, 1]


def test_the_score_threshold_keeps_what_reaches_it() -> None:
    raw = draw_raw([(0.5, 0, stripe(0, 2)), (0.4999, 1, stripe(4, 6))])
    assert list_segments(segment(raw, "panoptic", Thresholds(score_threshold=0.5))) == [(1, 1, True)]


def test_a_mask_half_covered_by_a_better_one_keeps_the_rest_and_one_covered_further_is_dropped() -> None:
    better, half, three_quarters = stripe(0, 4), stripe(2, 6), stripe(1, 5)
    answer = segment(draw_raw([(0.9, 0, better), (0.8, 1, half), (0.7, 2, three_quarters)]), "panoptic")
    assert list_segments(answer) == [(1, 1, True), (2, 2, True)]
    assert answer.label_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]


def test_a_dropped_mask_covers_nobody() -> None:
    answer = segment(draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 1, stripe(1, 5)), (0.7, 2, stripe(4, 6))]), "panoptic")
    assert answer.label_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert [each.cluster for each in answer.segments] == [1, 3]


def test_a_hidden_mask_is_dropped_whatever_the_overlap_allowed() -> None:
    raw = draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 1, stripe(1, 3))])
    assert len(segment(raw, "panoptic", Thresholds(score_threshold=0.0, overlap_threshold=1.0)).segments) == 1


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_scores_that_are_not_numbers_are_dropped_and_their_neighbours_are_not(task: Task) -> None:
    raw = draw_raw(
        [(np.nan, 0, stripe(0, 2)), (0.9, 1, stripe(2, 4)), (np.nan, 2, stripe(4, 6)), (0.4, 2, stripe(6, 8))]
    )
    assert [each.cluster for each in segment(raw, task).segments] == [2, 3]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_empty_masks_padding_and_masks_that_are_not_numbers_give_no_segment(task: Task) -> None:
    empty, unknown = np.zeros((8, 8), np.float32), np.full((8, 8), np.nan, np.float32)
    answer = segment(draw_raw([(0.9, 0, empty), (0.8, 1, unknown), (0.0, 2, stripe(0, 8))]), task)
    assert answer.segments == ()
    assert not answer.label_map.any()


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_a_network_without_detections_gives_an_empty_map(task: Task) -> None:
    answer = segment(draw_raw([]), task)
    assert answer.segments == ()
    assert answer.label_map.tolist() == np.zeros((8, 8), int).tolist()


def test_a_pixel_belongs_to_a_mask_only_above_the_threshold() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[0, :3] = (0.5, 0.51, 1.0)
    assert segment(draw_raw([(0.9, 0, mask)]), "panoptic").label_map[0, :3].tolist() == [0, 1, 1]


def test_stuff_fills_what_things_leave_and_things_without_a_mask_stay_void() -> None:
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = 2
    answer = segment(draw_raw([(0.9, 0, stripe(3, 6))], labels), "panoptic")
    assert list_segments(answer) == [(1, 1, True), (2, THINGS + 2, False)]
    assert answer.label_map[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert answer.label_map[1].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]


def test_stuff_smaller_than_its_share_of_the_image_becomes_void() -> None:
    labels = np.zeros((8, 8), int)
    labels[0, :4], labels[7, :3] = 1, 2
    answer = segment(draw_raw([], labels), "panoptic", Thresholds(min_stuff_area_fraction=4 / 64))
    assert list_segments(answer) == [(1, THINGS + 1, False)]
    assert not answer.label_map[7].any()


def test_the_area_of_stuff_is_what_things_leave_of_it() -> None:
    labels = np.zeros((8, 8), int)
    labels[0, :4] = 1
    raw = draw_raw([(0.9, 0, stripe(0, 1))], labels)
    assert [
        each.is_thing for each in segment(raw, "panoptic", Thresholds(min_stuff_area_fraction=4 / 64)).segments
    ] == [True]


def test_the_score_of_stuff_is_the_mean_probability_where_it_wins() -> None:
    logits = np.zeros((3, 8, 8), np.float32)
    logits[0] = -50.0
    logits[2, :, :4], logits[2, :, 4:] = np.log(3.0), np.log(7.0)  # 3/4 and 7/8 against label 1
    (stuff,) = segment(draw_raw([], logits=logits), "panoptic").segments
    assert stuff.score == pytest.approx((0.75 + 0.875) / 2, abs=1e-6)  # float32


def test_semantic_puts_the_instances_of_a_cluster_in_one_segment() -> None:
    labels = np.zeros((8, 8), int)
    labels[7, 7] = 1
    raw = draw_raw([(0.9, 1, stripe(0, 1)), (0.8, 0, stripe(1, 3)), (0.5, 1, stripe(3, 6))], labels)
    answer = segment(raw, "semantic", Thresholds(score_threshold=0.0, min_stuff_area_fraction=0.5))
    assert list_segments(answer) == [(1, 1, True), (2, 2, True), (3, THINGS + 1, False)]
    assert answer.label_map[0].tolist() == [2, 1, 1, 2, 2, 2, 0, 0]
    assert answer.label_map[7, 7] == 3  # small stuff is kept
    # One pixel at 0.9 and three at 0.5; float32.
    assert answer.segments[1].score == pytest.approx((0.9 + 3 * 0.5) / 4, abs=1e-6)


def test_semantic_fills_what_would_be_void_with_doubtful_objects_best_first() -> None:
    labels = np.zeros((8, 8), int)
    labels[0, 6:] = 1
    sure, doubtful, worse, hopeless = (0.9, 0, stripe(0, 2)), (0.5, 1, stripe(1, 4)), (0.3, 0, stripe(3, 7)), 0.1999
    raw = draw_raw([sure, doubtful, worse, (hopeless, 2, draw_mask(slice(0, 2), slice(0, 8)))], labels)
    thresholds = Thresholds(score_threshold=0.8, min_stuff_area_fraction=0.0)
    answer = segment(raw, "semantic", thresholds)
    assert list_segments(answer) == [(1, 1, True), (2, 2, True), (3, THINGS + 1, False)]
    assert answer.label_map[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]  # stuff stays stuff
    assert not answer.label_map[1].any()
    assert answer.segments[0].score == pytest.approx((2 * 0.9 + 2 * 0.3) / 4, abs=1e-6)  # float32
    assert segment(raw, "panoptic", thresholds).label_map[0].tolist() == [1, 1, 0, 0, 0, 0, 2, 2]
    assert len(segment(raw, "instance", thresholds).segments) == 1


def test_semantic_keeps_what_is_left_of_an_object_that_panoptic_drops() -> None:
    raw = draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 1, stripe(1, 5))])
    answer = segment(raw, "semantic", Thresholds(score_threshold=0.5))
    assert answer.label_map[0].tolist() == [1, 1, 1, 1, 2, 0, 0, 0]
    assert len(segment(raw, "panoptic", Thresholds(score_threshold=0.5)).segments) == 1


def test_instances_keep_their_whole_masks_and_the_best_one_shows() -> None:
    answer = segment(draw_raw([(0.6, 1, stripe(2, 6)), (0.9, 0, stripe(0, 4)), (0.5, 2, stripe(1, 3))]), "instance")
    assert list_segments(answer) == [(1, 1, True), (2, 2, True), (3, 3, True)]
    assert answer.label_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert [(crop.top, crop.left, crop.bits.tolist()) for crop in answer.masks] == [
        (0, 0, [[True] * 4]),
        (0, 2, [[True] * 4]),
        (0, 1, [[True] * 2]),
    ]


def test_the_crop_of_a_mask_in_parts_holds_all_of_them() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[2, 3] = mask[5, 6] = 1.0
    (crop,) = segment(draw_raw([(0.9, 0, mask)]), "instance").masks
    assert (crop.top, crop.left, crop.bits.shape) == (2, 3, (4, 4))
    assert np.argwhere(crop.bits).tolist() == [[0, 0], [3, 3]]


def test_a_detection_in_parts_becomes_one_segment_a_part_and_crumbs_are_dropped() -> None:
    mask = (
        draw_mask(slice(0, 2), slice(0, 5)) + draw_mask(slice(4, 6), slice(0, 2)) + draw_mask(slice(7, 8), slice(7, 8))
    )
    answer = segment(
        draw_raw([(0.9, 0, mask)]), "panoptic", replace(KEEP_ALL, min_component_area_fraction=0.3)
    )  # of 10, 4 and 1 cells
    assert [(each.id, each.cluster) for each in answer.segments] == [(1, 1), (2, 1)]
    assert [each.score for each in answer.segments] == pytest.approx([0.9, 0.9])
    assert answer.label_map[:2, :5].tolist() == [[1] * 5] * 2
    assert answer.label_map[4:6, :2].tolist() == [[2] * 2] * 2
    assert answer.label_map[7, 7] == 0


def test_parts_that_touch_at_a_corner_are_one() -> None:
    mask = draw_mask(slice(0, 2), slice(0, 2)) + draw_mask(slice(2, 4), slice(2, 4))
    assert (
        len(
            segment(draw_raw([(0.9, 0, mask)]), "instance", replace(KEEP_ALL, min_component_area_fraction=0.1)).segments
        )
        == 1
    )


def test_an_empty_mask_has_no_parts() -> None:
    assert (
        segment(
            draw_raw([(0.9, 0, np.zeros((8, 8)))]), "instance", replace(KEEP_ALL, min_component_area_fraction=0.1)
        ).segments
        == ()
    )


def test_what_the_network_sees_in_the_padding_is_ignored() -> None:
    labels = np.full((8, 8), 2)
    labels[:4] = 0
    below = draw_mask(slice(4, 8), slice(0, 8))
    answer = segment(draw_raw([(0.9, 0, below)], labels), "panoptic", height=4, width=8)
    assert answer.segments == ()
    assert answer.label_map.shape == (4, 8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 47), (100, 63)])
def test_answers_come_in_the_images_size_with_edges_within_a_pixel(height: int, width: int) -> None:
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


def test_a_mask_in_its_box_is_drawn_where_the_box_lies_in_the_image() -> None:
    """The image is twice as large as it lies on its canvas, so is the box."""
    mask = np.full((28, 28), 0.9, np.float32)
    mask[:, 14:] = 0.0
    raw = replace(
        draw_raw([(0.9, 0, mask), (0.8, 1, mask)]),
        boxes=np.array([[8, 4, 24, 20], [-50, 28, 60, 90]], np.float32),  # the second leaves the image
    )
    contract = replace(draw_contract(side_px=32, stride_px=4), box_mask_size=28)
    letterbox = plan_letterbox(64, 64, [InputSize.square(32)], 4)
    instances = postprocess(raw, letterbox, contract, "instance", KEEP_ALL)
    assert list_segments(instances) == [(1, 1, True), (2, 2, True)]
    first, second = (np.argwhere(instances.label_map == segment) for segment in (1, 2))
    assert (first.min(0).tolist(), first.max(0).tolist()) == ([8, 16], [39, 31])
    assert (second.min(0).tolist(), second.max(0).tolist()) == ([56, 0], [63, 31])  # half of the box that is left


def test_a_box_outside_the_image_or_without_area_draws_nothing() -> None:
    mask = np.full((28, 28), 0.9, np.float32)
    raw = replace(
        draw_raw([(0.9, 0, mask), (0.8, 1, mask)]), boxes=np.array([[40, 40, 60, 60], [9, 9, 9, 9]], np.float32)
    )
    contract = replace(draw_contract(side_px=32, stride_px=4), box_mask_size=28)
    letterbox = plan_letterbox(64, 64, [InputSize.square(32)], 4)
    assert postprocess(raw, letterbox, contract, "instance", KEEP_ALL).segments == ()


def test_the_parts_of_a_mask_in_its_box_become_detections_of_their_own() -> None:
    mask = np.zeros((28, 28), np.float32)
    mask[:, :8], mask[:, 20:] = 0.9, 0.9
    raw = replace(draw_raw([(0.9, 0, mask)]), boxes=np.array([[0, 0, 28, 28]], np.float32))
    contract = replace(draw_contract(side_px=32, stride_px=4), box_mask_size=28)
    letterbox = plan_letterbox(32, 32, [InputSize.square(32)], 4)
    answer = postprocess(raw, letterbox, contract, "instance", replace(KEEP_ALL, min_component_area_fraction=0.5))
    assert [int((answer.label_map == each.id).sum()) for each in answer.segments] == [8 * 28, 8 * 28]


def test_a_network_that_knows_things_alone_leaves_the_rest_void() -> None:
    raw = draw_raw([(0.9, 0, draw_mask(slice(2, 4), slice(2, 4)))], logits=np.zeros((1, 8, 8), np.float32))
    answer = postprocess(
        raw, plan_letterbox(8, 8, [InputSize.square(8)], 1), draw_contract(stuff=0), "panoptic", KEEP_ALL
    )
    assert list_segments(answer) == [(1, 1, True)]
    assert int((answer.label_map == 0).sum()) == 60


def test_random_answers_give_maps_and_segments_that_agree() -> None:
    generator = np.random.default_rng(17)
    for _ in range(60):
        height, width = (int(length) for length in generator.integers(1, 40, 2))
        count = int(generator.integers(0, 6))
        raw = RawOutputs(
            scores=generator.random(count, np.float32),
            clusters=generator.integers(0, THINGS, count),
            boxes=np.zeros((count, 4), np.float32),
            masks=generator.random((count, 8, 8), np.float32),
            semantic=generator.normal(size=(3, 8, 8)).astype(np.float32),
        )
        for task in ("panoptic", "semantic"):
            answer = segment(raw, task, height=height, width=width)
            assert [each.id for each in answer.segments] == list(range(1, len(answer.segments) + 1))
            assert set(np.unique(answer.label_map)) - {0} == {each.id for each in answer.segments}
            assert all(0.0 <= each.score <= 1.0 for each in answer.segments)
            assert all(each.is_thing == (each.cluster <= THINGS) for each in answer.segments)


@pytest.mark.golden
def test_the_merge_is_detectron2s(golden: Path) -> None:
    """At stride 1 in a square that the image fills, nothing is resized; the area limit is given as its share."""
    units = np.load(golden / "detectron2" / "units.npz")
    expected = json.loads((golden / "detectron2" / "unit_combine.json").read_text())
    count, height, width = units["combine_masks"].shape
    labels = np.zeros((width, width), int)
    labels[:height] = units["combine_sem"]
    masks = np.zeros((count, width, width), np.float32)
    masks[:, :height] = units["combine_masks"]
    raw = RawOutputs(
        scores=units["combine_scores"],
        clusters=units["combine_classes"],
        boxes=np.zeros((count, 4), np.float32),
        masks=masks,
        semantic=draw_logits(labels, count=int(labels.max()) + 1),
    )
    contract = draw_contract(side_px=width, stuff=int(labels.max()), detections=count)
    thresholds = Thresholds(
        score_threshold=expected["instances_confidence"],
        overlap_threshold=expected["overlap_threshold"],
        min_stuff_area_fraction=expected["stuff_area_limit"] / (height * width),
    )
    answer = postprocess(
        raw, plan_letterbox(height, width, [InputSize.square(width)], 1), contract, "panoptic", thresholds
    )
    np.testing.assert_array_equal(answer.label_map, units["combine_panoptic"])
    assert list_segments(answer) == [
        (each["id"], each["category_id"] + (1 if each["isthing"] else THINGS), each["isthing"])
        for each in expected["segments_info"]
    ]


@pytest.mark.parametrize("duplicate", [0.5, 1.0])
def test_a_detection_over_a_better_one_of_another_cluster_is_a_duplicate_if_asked(duplicate: float) -> None:
    better, same, other = stripe(0, 4), stripe(1, 4), stripe(3, 7)  # IoU with the first: 3/4 and 1/7
    raw = draw_raw([(0.9, 0, better), (0.8, 1, same), (0.7, 2, other)])
    answer = segment(raw, "instance", replace(KEEP_ALL, duplicate_iou_threshold=duplicate))
    assert [each.cluster for each in answer.segments] == ([1, 3] if duplicate < 1.0 else [1, 2, 3])


def test_tasks_from_one_assembler_are_those_assembled_alone() -> None:
    labels = np.zeros((8, 8), int)
    labels[:, 4:], labels[7, :2] = 1, 2
    raw = draw_raw([(0.9, 0, stripe(0, 4)), (0.8, 0, stripe(3, 7))], labels)
    thresholds = Thresholds(score_threshold=0.0, min_stuff_area_fraction=4 / 64)
    letterbox = plan_letterbox(8, 8, [InputSize.square(8)], 1)
    assemble_task = make_postprocessor(raw, letterbox, draw_contract(), thresholds)
    tasks: tuple[Task, ...] = ("semantic", "instance", "panoptic", "semantic")
    for task in tasks:
        alone, shared = segment(raw, task, thresholds), assemble_task(task)
        assert shared.segments == alone.segments
        np.testing.assert_array_equal(shared.label_map, alone.label_map)


def test_selected_clusters_keep_their_ids_and_the_rest_becomes_void() -> None:
    labels = np.zeros((8, 8), int)
    labels[1:] = 1
    raw = draw_raw([(0.9, 0, stripe(0, 2)), (0.8, 2, stripe(4, 6))], labels)
    answer = select_clusters(segment(raw, "panoptic"), {3, THINGS + 1})
    assert list_segments(answer) == [(2, 3, True), (3, THINGS + 1, False)]
    assert answer.label_map[0].tolist() == [0, 0, 0, 0, 2, 2, 0, 0]
    assert np.unique(answer.label_map[1:]).tolist() == [3]
    instances = select_clusters(segment(raw, "instance"), {3})
    assert [crop.left for crop in instances.masks] == [4]
    assert select_clusters(instances, set()).segments == ()


def test_more_segments_than_a_byte_can_number_are_told_apart() -> None:
    detections = [(0.9, 0, draw_mask(slice(0, 1), slice(0, 1)))] * 300
    letterbox = plan_letterbox(8, 8, [InputSize.square(8)], 1)
    answer = postprocess(draw_raw(detections), letterbox, draw_contract(), "instance", KEEP_ALL)
    assert [each.id for each in answer.segments] == list(range(1, 301))
    assert answer.label_map[0, 0] == 1
