import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.formats.encoders import decode_panoptic_png
from training.evaluation.metrics.bootstrap import stack_counts, weighted_sums
from training.evaluation.metrics.pq import (
    count_panoptic,
    count_semantic,
    count_unmapped,
    iou_per_class,
    panoptic_quality,
    panoptic_quality_per_class,
    semantic_quality,
)
from training.evaluation.overlap import compute_overlap, map_predicted

THREE = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 0, 0]], np.int32)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["synthetic", "coco"])
def test_panoptic_quality_is_panopticapis(golden: Path, name: str) -> None:
    folder = golden / "panoptic_pq" / name
    truth, answer, expected = (
        json.loads((folder / file).read_text()) for file in ("gt.json", "pred.json", "expected.json")
    )
    categories = {category["id"]: place for place, category in enumerate(truth["categories"])}
    things = np.array([category["isthing"] for category in truth["categories"]], bool)
    answers = {annotation["image_id"]: annotation for annotation in answer["annotations"]}
    counts = []
    for annotation in truth["annotations"]:
        predicted = answers[annotation["image_id"]]
        overlap = compute_overlap(
            decode_panoptic_png((folder / "pred" / predicted["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in predicted["segments_info"]},
            decode_panoptic_png((folder / "gt" / annotation["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in annotation["segments_info"]},
            frozenset(segment["id"] for segment in annotation["segments_info"] if segment["iscrowd"]),
        )
        counts.append(count_panoptic(overlap, len(categories)))
    summed = weighted_sums(stack_counts(counts), np.ones(len(counts)))
    for key, chosen in (("all", slice(None)), ("things", things), ("stuff", ~things)):
        scores = panoptic_quality(summed, chosen)  # type: ignore[arg-type]  # a boolean index chooses like a slice
        # The reference sums the same fractions in another order.
        assert scores == pytest.approx({name: expected[key][name] for name in ("pq", "sq", "rq")}, abs=1e-12)
    per_class = panoptic_quality_per_class(summed)
    for number, figures in expected["per_class"].items():
        place = categories[int(number)]
        assert {key: per_class[key][place] for key in figures} == pytest.approx(figures, abs=1e-12)


def test_a_match_needs_more_than_half_and_gives_its_iou() -> None:
    true = np.array([[1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]], np.int32)
    predicted = np.array([[1, 1, 1, 1, 3, 3], [2, 2, 2, 3, 3, 3]], np.int32)
    counts = count_panoptic(compute_overlap(predicted, {1: 0, 2: 0, 3: 1}, true, {1: 0, 2: 0}), 2)
    assert counts.iou.tolist() == [pytest.approx(4 / 6), 0.0]  # the second has exactly a half
    assert (counts.matched.tolist(), counts.wrong.tolist(), counts.missed.tolist()) == ([1, 0], [1, 1], [1, 0])
    # PQ of category 0: 2/3 of 1 + 1/2 + 1/2; category 1 is there by its false positive alone.
    assert panoptic_quality(counts)["pq"] == pytest.approx((4 / 6 / 2 + 0) / 2)


def test_a_cluster_without_a_name_is_an_error_where_it_lies_and_free_when_lenient() -> None:
    overlap = compute_overlap(THREE, {1: 1, 2: 2, 3: 3}, THREE, {1: 0, 2: 1})
    table = np.array([-1, 0, -1, -1])
    named = count_panoptic(map_predicted(overlap, table, merged_from=9), 2)
    counts = replace(named, unnamed=count_unmapped(overlap, table, 2))
    assert counts.unnamed.tolist() == [0.0, 1.0]  # cluster 2 lies on category 1, cluster 3 on void, which excuses it
    assert panoptic_quality_per_class(counts)["pq"].tolist() == [1.0, 0.0]
    assert panoptic_quality_per_class(counts)["weight"].tolist() == [1.0, 1.0]
    assert panoptic_quality_per_class(counts, lenient=True)["weight"].tolist() == [1.0, 0.5]


def test_semantic_scores_of_pixels_known_by_hand() -> None:
    predicted = np.array([[1, 1, 2, 0]], np.int32)
    true = np.array([[1, 1, 1, 2]], np.int32)
    counts = count_semantic(compute_overlap(predicted, {1: 0, 2: 1}, true, {1: 0, 2: 1}), 2)
    # Category 0: 2 of 3 pixels; category 1: none of 2, its only pixel being void.
    assert iou_per_class(counts).tolist() == pytest.approx([2 / 3, 0.0])
    assert semantic_quality(counts) == pytest.approx({"miou": (2 / 3 + 0) / 2, "accuracy": 0.5})
    assert semantic_quality(counts, slice(0, 1))["miou"] == pytest.approx(2 / 3)
    # When lenient the void pixel does not count, and with it category 1 is not in the truth.
    assert semantic_quality(counts, lenient=True) == pytest.approx({"miou": 2 / 3, "accuracy": 2 / 3})


def test_counts_of_two_parts_of_a_set_add_up_to_those_of_the_whole() -> None:
    first = count_semantic(compute_overlap(THREE, {1: 0, 2: 1}, THREE, {1: 0, 3: 1}), 2)
    second = count_semantic(compute_overlap(THREE.copy(), {1: 1}, THREE, {1: 0, 2: 1}), 2)
    whole = weighted_sums(stack_counts([first, second]), np.ones(2))
    assert whole.true.tolist() == (first.true + second.true).tolist() == [8.0, 6.0]
    assert weighted_sums(stack_counts([first, second]), np.array([[2.0, 0.0]])).true.tolist() == [[8.0, 4.0]]
