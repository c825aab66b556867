"""Overlaps of label maps, and matching of clusters to categories, against the reference implementations."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.evaluation.cluster_matching import (
    UNMATCHED,
    LabelSpaces,
    MatchingConfig,
    MatchingMethod,
    count_shared_pixels,
    count_stuff_votes,
    count_thing_votes,
    match_block,
    match_clusters,
)
from training.evaluation.metrics.segmentation import SemanticCounts, count_semantic, iou_per_class, semantic_quality
from training.evaluation.overlap import compute_overlap, map_predicted, merge_ground_truth_stuff

PREDICTED = np.array([[5, 5, 9, 9], [5, 5, 9, 0]], np.int32)
GROUND_TRUTH = np.array([[1, 1, 1, 2], [3, 3, 2, 2]], np.int32)


@pytest.mark.parametrize(
    ("predicted", "ground_truth", "pixels"),
    [
        ({5: 1, 9: 2}, {1: 0, 2: 1, 3: 1}, [[0, 0, 1, 0], [0, 2, 0, 2], [0, 1, 2, 0]]),
        ({9: 2}, {2: 1}, [[4, 1], [1, 2]]),
        ({}, {}, [[8]]),
    ],
)
def test_shared_pixels_are_counted_with_void_and_ids_that_are_not_listed_first(
    predicted: dict[int, int], ground_truth: dict[int, int], pixels: list[list[int]]
) -> None:
    assert compute_overlap(PREDICTED, predicted, GROUND_TRUTH, ground_truth).pixels.tolist() == pixels


def test_ground_truth_stuff_of_a_category_becomes_one_segment_and_things_stay_separate() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, GROUND_TRUTH, {1: 0, 2: 1, 3: 1})
    assert merge_ground_truth_stuff(overlap, num_things=1).pixels.tolist() == [[0, 0, 1], [0, 2, 2], [0, 1, 2]]
    assert merge_ground_truth_stuff(overlap, num_things=2).pixels.shape == (3, 4)


def test_the_mapping_is_applied_once_and_not_chained() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, GROUND_TRUTH, {1: 0, 2: 1, 3: 1})
    assert map_predicted(overlap, np.array([-1, 2, 1]), merged_from=9).predicted.tolist() == [2, 1]


def make_spaces(thing_clusters: int, stuff_clusters: int, num_things: int, num_categories: int) -> LabelSpaces:
    return LabelSpaces(
        thing_clusters=thing_clusters,
        stuff_clusters=stuff_clusters,
        num_things=num_things,
        num_categories=num_categories,
    )


def test_a_cluster_takes_the_category_with_which_it_shares_most_pixels() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, GROUND_TRUTH, {1: 0, 2: 1, 3: 0})
    only_things = make_spaces(3, 0, 2, 2)
    table = count_shared_pixels([overlap, overlap], only_things)
    assert table.tolist() == [[0, 0], [8, 0], [2, 4], [0, 0]]
    assert match_clusters(table, only_things, "majority").tolist() == [UNMATCHED, 0, 1, UNMATCHED]


def test_things_are_matched_among_things_and_stuff_among_stuff() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, GROUND_TRUTH, {1: 0, 2: 1, 3: 1})
    both = make_spaces(1, 1, 1, 2)
    assert match_clusters(count_shared_pixels([overlap], both), both, "majority").tolist() == [UNMATCHED, 0, 1]
    # As a thing, cluster 2 shares one pixel with the only thing, and three with stuff that it must not take.
    assert (
        match_clusters(count_shared_pixels([overlap], make_spaces(2, 0, 1, 2)), make_spaces(2, 0, 1, 2), "majority")[2]
        == 0
    )


COUNTS = np.array([[9, 8, 0], [7, 1, 0], [0, 3, 2], [0, 0, 0]])


def test_hungarian_matching_is_one_to_one_with_the_highest_sum() -> None:
    # 8 + 7 + 2 is more than the greedy 9 + 3: row 0 does not get its best column.
    assert match_block(COUNTS, "hungarian").tolist() == [1, 0, 2, UNMATCHED]
    assert match_block(COUNTS, "majority").tolist() == [0, 0, 1, UNMATCHED]


def test_cups_matches_the_remaining_clusters_by_majority() -> None:
    more = np.array([[9, 8], [7, 1], [0, 3], [5, 6], [0, 0]])
    assert match_block(more, "hungarian").tolist() == [1, 0, UNMATCHED, UNMATCHED, UNMATCHED]
    assert match_block(more, "cups").tolist() == [1, 0, 1, 1, UNMATCHED]


def test_a_detection_votes_for_every_object_that_its_box_overlaps_enough() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 4]], float)
    object_boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 10, 10]], float)
    table = count_thing_votes(
        np.array([1, 2, 1]),
        np.array([0.4, 0.39, 0.9]),  # the second score is too low, the third box overlaps too little
        boxes,
        np.array([0, 1, 1]),
        object_boxes,
        make_spaces(2, 0, 2, 2),
        MatchingConfig(min_score=0.4, min_iou=0.6),
    )
    assert table.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.golden
def test_thing_votes_equal_u2segs(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "things_votes.json").read_text())
    index = {int(source): index for source, index in stored["dataset_id_to_contiguous_id"].items()}
    clusters = stored["num_clusters"]
    spaces = make_spaces(clusters, 0, len(index), len(index))
    config = MatchingConfig(min_score=stored["score_threshold"], min_iou=stored["iou_threshold"])
    counts = spaces.zero_counts()
    for image in {each["image_id"] for each in stored["predictions"]}:
        detections = [each for each in stored["predictions"] if each["image_id"] == image]
        objects = [each for each in stored["gt"] if each["image_id"] == image]
        counts += count_thing_votes(
            np.array([each["category_id"] + 1 for each in detections]),
            np.array([each["score"] for each in detections]),
            np.array([each["bbox"] for each in detections], float).reshape(-1, 4),
            np.array([index[each["category_id"]] for each in objects], np.int64),
            np.array([each["bbox"] for each in objects], float).reshape(-1, 4),
            spaces,
            config,
        )
    assert counts[1:].tolist() == stored["votes"]
    assert match_clusters(counts, spaces, "votes")[1:].tolist() == [
        stored["mapping"][str(each)] for each in range(clusters)
    ]


@pytest.mark.golden
def test_stuff_votes_and_metrics_equal_u2segs_without_its_chained_mapping(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "stuff_votes.json").read_text())
    with np.load(golden / "mapping" / "stuff_votes.npz") as arrays:
        ground_truth, predicted, votes, lut = (arrays[key] for key in ("gt", "pred", "votes", "lut"))
    # Class 0 is "things" on both sides, class 16 of the ground truth is void; segment ids here are class + 1.
    spaces = make_spaces(0, 27, 1, 16)
    categories = {each + 1: each for each in range(16)}
    clusters = {each + 1: each for each in range(28)}
    overlaps = [
        compute_overlap(p.astype(np.int32) + 1, clusters, t.astype(np.int32) + 1, categories)
        for p, t in zip(predicted, ground_truth, strict=True)
    ]
    config = MatchingConfig(min_stuff_iou=stored["iou_threshold"])
    table = np.sum([count_stuff_votes(each, spaces, config) for each in overlaps], axis=0)
    assert np.array_equal(table[1:, 1:], votes[1:, 1:16])
    matched = match_clusters(table, spaces, "votes")
    assert matched[1:].tolist() == [-1 if each == stored["void_id"] else each for each in lut[1:]]

    matched[0] = 0
    counts = [count_semantic(map_predicted(each, matched, merged_from=0), 16) for each in overlaps]
    summed = type(counts[0])(**{key: sum(vars(each)[key] for each in counts) for key in vars(counts[0])})
    for key, ignore_unmapped in (
        ("scores_published_rule_unmapped_dropped", True),
        ("scores_unmapped_counted_as_errors", False),
    ):
        scores = semantic_quality(summed, ignore_unmapped=ignore_unmapped)
        assert 100 * scores["accuracy"] == pytest.approx(stored[key]["pACC"], abs=1e-9)
        assert 100 * scores["miou"] == pytest.approx(stored[key]["mIoU"], abs=1e-9)
        assert 100 * iou_per_class(summed, ignore_unmapped=ignore_unmapped) == pytest.approx(
            np.array(stored[key]["IoU"]), abs=1e-9
        )


@pytest.mark.golden
def test_assignments_equal_cups(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "cups.json").read_text())
    with np.load(golden / "mapping" / "cups_confusion.npz") as arrays:
        tables = dict(arrays)
    for case in stored:
        table = tables[case["name"]]
        whole = [(list(range(case["num_clusters"])), list(range(case["num_classes"])))]
        split = [(case["things_prototype"], case["things"]), (case["stuffs_prototype"], case["stuffs"])]
        method: MatchingMethod = "hungarian" if case["one_to_one"] else "cups"
        expected = [UNMATCHED if each == 255 else each for each in case["assignment"]]
        assert match_blocks(table, split if case["things_prototype"] else whole, method) == expected, case["name"]
        unsplit = [UNMATCHED if each == 255 else each for each in case["assignment_no_separation"]]
        assert match_blocks(table, whole, method) == unsplit, case["name"]
        # CUPS treats pixels of unmatched clusters as void predictions, which do not count.
        scores = semantic_quality(count_table(table, np.array(unsplit)), ignore_unmapped=case["one_to_one"])
        assert scores == pytest.approx({"miou": case["miou"], "accuracy": case["acc"]}, abs=1e-9), case["name"]


def count_table(table: np.ndarray, matched: np.ndarray) -> SemanticCounts:
    """Return the semantic counts of a confusion matrix of clusters (rows) and classes."""
    mapped = np.zeros((table.shape[1], table.shape[1]))
    np.add.at(mapped, matched[matched >= 0], table[matched >= 0])
    return SemanticCounts(
        intersection=np.diag(mapped), ground_truth=table.sum(0), predicted=mapped.sum(1), mapped=mapped.sum(0)
    )


def match_blocks(table: np.ndarray, blocks: list[tuple[list[int], list[int]]], method: MatchingMethod) -> list[int]:
    found = np.full(len(table), UNMATCHED)
    for rows, columns in blocks:
        local = match_block(table[np.ix_(rows, columns)], method)
        found[rows] = np.where(local == UNMATCHED, UNMATCHED, np.array(columns)[local])
    return found.tolist()
