import json
from pathlib import Path

import numpy as np
import pytest

from model.errors import ConfigError
from training.evaluation.matching.cluster_matching import (
    UNMATCHED,
    LabelSpaces,
    VoteThresholds,
    count_shared_pixels,
    count_stuff_votes,
    count_thing_votes,
    match,
    match_block,
    pairwise_xywh_iou,
)
from training.evaluation.metrics.pq import SemanticCounts, count_semantic, iou_per_class, semantic_quality
from training.evaluation.overlap import compute_overlap, map_predicted

PREDICTED = np.array([[5, 5, 9, 9], [5, 5, 9, 0]], np.int32)
TRUE = np.array([[1, 1, 1, 2], [3, 3, 2, 2]], np.int32)


def spaces(thing_clusters: int, stuff_clusters: int, things: int, categories: int) -> LabelSpaces:
    return LabelSpaces(
        thing_clusters=thing_clusters, stuff_clusters=stuff_clusters, things=things, categories=categories
    )


def test_clusters_take_the_category_they_share_most_pixels_with() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 0})
    only_things = spaces(3, 0, 2, 2)
    table = count_shared_pixels([overlap, overlap], only_things)
    assert table.tolist() == [[0, 0], [8, 0], [2, 4], [0, 0]]
    assert match(table, only_things, "majority").tolist() == [UNMATCHED, 0, 1, UNMATCHED]


def test_things_are_matched_among_things_and_stuff_among_stuff() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 1})
    both = spaces(1, 1, 1, 2)
    assert match(count_shared_pixels([overlap], both), both, "majority").tolist() == [UNMATCHED, 0, 1]
    # Cluster 2 as a thing shares one pixel with the only thing, and three with stuff that it must not take.
    assert match(count_shared_pixels([overlap], spaces(2, 0, 1, 2)), spaces(2, 0, 1, 2), "majority")[2] == 0


def test_a_crowd_does_not_vote_with_its_pixels() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 0}, crowds=frozenset({2}))
    only_things = spaces(2, 0, 2, 2)
    assert match(count_shared_pixels([overlap], only_things), only_things, "majority").tolist() == [UNMATCHED, 0, 0]


MEETINGS = np.array([[9, 8, 0], [7, 1, 0], [0, 3, 2], [0, 0, 0]])


def test_an_assignment_is_one_to_one_and_shares_most_in_all() -> None:
    # 8 + 7 + 2 beats the greedy 9 + 3: row 0 gives up its best column.
    assert match_block(MEETINGS, "assignment").tolist() == [1, 0, 2, UNMATCHED]
    assert match_block(MEETINGS, "majority").tolist() == [0, 0, 1, UNMATCHED]


def test_the_rest_of_an_assignment_follows_the_majority_in_cups() -> None:
    more = np.array([[9, 8], [7, 1], [0, 3], [5, 6], [0, 0]])
    assert match_block(more, "assignment").tolist() == [1, 0, UNMATCHED, UNMATCHED, UNMATCHED]
    assert match_block(more, "cups").tolist() == [1, 0, 1, 1, UNMATCHED]


def test_tables_of_two_parts_of_a_set_add_up_to_that_of_the_whole() -> None:
    first = compute_overlap(PREDICTED, {5: 1, 9: 2}, TRUE, {1: 0, 2: 1, 3: 0})
    second = compute_overlap(TRUE, {1: 1, 2: 2}, PREDICTED, {5: 0, 9: 1})
    only_things = spaces(2, 0, 2, 2)
    apart = count_shared_pixels([first], only_things) + count_shared_pixels([second], only_things)
    assert np.array_equal(apart, count_shared_pixels([first, second], only_things))


def test_a_box_votes_for_every_object_it_covers_well_enough() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 4]], float)
    true_boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 10, 10]], float)
    table = count_thing_votes(
        np.array([1, 2, 1]),
        np.array([0.4, 0.39, 0.9]),  # the second is not sure enough, the third covers too little
        boxes,
        np.array([0, 1, 1]),
        true_boxes,
        spaces(2, 0, 2, 2),
        VoteThresholds(score=0.4, iou=0.6),
    )
    assert table.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_box_iou_of_boxes_known_by_hand() -> None:
    first = np.array([[0, 0, 2, 2], [0, 0, 0, 0]], float)
    second = np.array([[1, 1, 2, 2], [5, 5, 1, 1]], float)
    assert pairwise_xywh_iou(first, second) == pytest.approx(np.array([[1 / 7, 0], [0, 0]]))


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stuff_iou must lie in 0\.\.1, got 1\.5"):
        VoteThresholds(stuff_iou=1.5)


@pytest.mark.golden
def test_thing_votes_are_u2segs(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "things_votes.json").read_text())
    index = {int(key): place for key, place in stored["dataset_id_to_contiguous_id"].items()}
    clusters = stored["num_clusters"]
    here = spaces(clusters, 0, len(index), len(index))
    thresholds = VoteThresholds(score=stored["score_threshold"], iou=stored["iou_threshold"])
    table = here.make_table()
    for image in {each["image_id"] for each in stored["predictions"]}:
        found = [each for each in stored["predictions"] if each["image_id"] == image]
        true = [each for each in stored["gt"] if each["image_id"] == image]
        table += count_thing_votes(
            np.array([each["category_id"] + 1 for each in found]),
            np.array([each["score"] for each in found]),
            np.array([each["bbox"] for each in found], float).reshape(-1, 4),
            np.array([index[each["category_id"]] for each in true], np.int64),
            np.array([each["bbox"] for each in true], float).reshape(-1, 4),
            here,
            thresholds,
        )
    assert table[1:].tolist() == stored["votes"]
    assert match(table, here, "votes")[1:].tolist() == [stored["mapping"][str(each)] for each in range(clusters)]


@pytest.mark.golden
def test_stuff_votes_and_scores_are_u2segs_without_its_chained_renaming(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "stuff_votes.json").read_text())
    with np.load(golden / "mapping" / "stuff_votes.npz") as arrays:
        truth, predicted, votes, lut = (arrays[key] for key in ("gt", "pred", "votes", "lut"))
    # Class 0 is "things" on both sides, class 16 of the truth void; segment ids here are class + 1.
    here = spaces(0, 27, 1, 16)
    true = {each + 1: each for each in range(16)}
    found = {each + 1: each for each in range(28)}
    overlaps = [
        compute_overlap(p.astype(np.int32) + 1, found, t.astype(np.int32) + 1, true)
        for p, t in zip(predicted, truth, strict=True)
    ]
    thresholds = VoteThresholds(stuff_iou=stored["iou_threshold"])
    table = np.sum([count_stuff_votes(each, here, thresholds) for each in overlaps], axis=0)
    assert np.array_equal(table[1:, 1:], votes[1:, 1:16])
    matched = match(table, here, "votes")
    assert matched[1:].tolist() == [-1 if each == stored["void_id"] else each for each in lut[1:]]

    matched[0] = 0
    counts = [count_semantic(map_predicted(each, matched, merged_from=0), 16) for each in overlaps]
    summed = type(counts[0])(**{key: sum(vars(each)[key] for each in counts) for key in vars(counts[0])})
    for key, lenient in (
        ("scores_published_rule_unmapped_dropped", True),
        ("scores_unmapped_counted_as_errors", False),
    ):
        scores = semantic_quality(summed, lenient=lenient)
        assert 100 * scores["accuracy"] == pytest.approx(stored[key]["pACC"], abs=1e-9)
        assert 100 * scores["miou"] == pytest.approx(stored[key]["mIoU"], abs=1e-9)
        assert 100 * iou_per_class(summed, lenient=lenient) == pytest.approx(np.array(stored[key]["IoU"]), abs=1e-9)


@pytest.mark.golden
def test_assignments_are_cups(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "cups.json").read_text())
    with np.load(golden / "mapping" / "cups_confusion.npz") as arrays:
        tables = dict(arrays)
    for case in stored:
        table = tables[case["name"]]
        whole = [(list(range(case["num_clusters"])), list(range(case["num_classes"])))]
        split = [(case["things_prototype"], case["things"]), (case["stuffs_prototype"], case["stuffs"])]
        method = "assignment" if case["one_to_one"] else "cups"
        expected = [UNMATCHED if each == 255 else each for each in case["assignment"]]
        assert match_blocks(table, split if case["things_prototype"] else whole, method) == expected, case["name"]
        unsplit = [UNMATCHED if each == 255 else each for each in case["assignment_no_separation"]]
        assert match_blocks(table, whole, method) == unsplit, case["name"]
        # There, pixels of a cluster left over are void on the predicted side and do not count.
        scores = semantic_quality(count_table(table, np.array(unsplit)), lenient=case["one_to_one"])
        assert scores == pytest.approx({"miou": case["miou"], "accuracy": case["acc"]}, abs=1e-9), case["name"]


def count_table(table: np.ndarray, matched: np.ndarray) -> SemanticCounts:
    """Semantic counts of a confusion of clusters (rows) with classes."""
    named = np.zeros((table.shape[1], table.shape[1]))
    np.add.at(named, matched[matched >= 0], table[matched >= 0])
    return SemanticCounts(right=np.diag(named), true=table.sum(0), predicted=named.sum(1), named=named.sum(0))


def match_blocks(table: np.ndarray, blocks: list[tuple[list[int], list[int]]], method: str) -> list[int]:
    found = np.full(len(table), UNMATCHED)
    for rows, columns in blocks:
        local = match_block(table[np.ix_(rows, columns)], method)  # type: ignore[arg-type]
        found[rows] = np.where(local == UNMATCHED, UNMATCHED, np.array(columns)[local])
    return found.tolist()
