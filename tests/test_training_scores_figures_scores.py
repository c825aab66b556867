import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.encodings import decode_panoptic_png
from training.scores.figures.intervals import stack, weigh
from training.scores.figures.scores import (
    count_panoptic,
    count_semantic,
    count_unnamed,
    score_iou,
    score_panoptic,
    score_panoptic_classes,
    score_semantic,
)
from training.scores.meetings.overlap import measure_overlap, rename_predicted

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
        overlap = measure_overlap(
            decode_panoptic_png((folder / "pred" / predicted["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in predicted["segments_info"]},
            decode_panoptic_png((folder / "gt" / annotation["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in annotation["segments_info"]},
            frozenset(segment["id"] for segment in annotation["segments_info"] if segment["iscrowd"]),
        )
        counts.append(count_panoptic(overlap, len(categories)))
    summed = weigh(stack(counts), np.ones(len(counts)))
    for key, chosen in (("all", slice(None)), ("things", things), ("stuff", ~things)):
        scores = score_panoptic(summed, chosen)  # type: ignore[arg-type]  # a boolean index chooses like a slice
        # The reference sums the same fractions in another order.
        assert scores == pytest.approx({name: expected[key][name] for name in ("pq", "sq", "rq")}, abs=1e-12)
    per_class = score_panoptic_classes(summed)
    for number, figures in expected["per_class"].items():
        place = categories[int(number)]
        assert {key: per_class[key][place] for key in figures} == pytest.approx(figures, abs=1e-12)


def test_a_match_needs_more_than_half_and_gives_its_iou() -> None:
    true = np.array([[1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]], np.int32)
    predicted = np.array([[1, 1, 1, 1, 3, 3], [2, 2, 2, 3, 3, 3]], np.int32)
    counts = count_panoptic(measure_overlap(predicted, {1: 0, 2: 0, 3: 1}, true, {1: 0, 2: 0}), 2)
    assert counts.iou.tolist() == [pytest.approx(4 / 6), 0.0]  # the second has exactly a half
    assert (counts.matched.tolist(), counts.wrong.tolist(), counts.missed.tolist()) == ([1, 0], [1, 1], [1, 0])
    # PQ of category 0: 2/3 of 1 + 1/2 + 1/2; category 1 is there by its false positive alone.
    assert score_panoptic(counts)["pq"] == pytest.approx((4 / 6 / 2 + 0) / 2)


def test_a_cluster_without_a_name_is_an_error_where_it_lies_and_free_when_lenient() -> None:
    overlap = measure_overlap(THREE, {1: 1, 2: 2, 3: 3}, THREE, {1: 0, 2: 1})
    table = np.array([-1, 0, -1, -1])
    named = count_panoptic(rename_predicted(overlap, table, merged_from=9), 2)
    counts = replace(named, unnamed=count_unnamed(overlap, table, 2))
    assert counts.unnamed.tolist() == [0.0, 1.0]  # cluster 2 lies on category 1, cluster 3 on void, which excuses it
    assert score_panoptic_classes(counts)["pq"].tolist() == [1.0, 0.0]
    assert score_panoptic_classes(counts)["weight"].tolist() == [1.0, 1.0]
    assert score_panoptic_classes(counts, lenient=True)["weight"].tolist() == [1.0, 0.5]


def test_semantic_scores_of_pixels_known_by_hand() -> None:
    predicted = np.array([[1, 1, 2, 0]], np.int32)
    true = np.array([[1, 1, 1, 2]], np.int32)
    counts = count_semantic(measure_overlap(predicted, {1: 0, 2: 1}, true, {1: 0, 2: 1}), 2)
    # Category 0: 2 of 3 pixels; category 1: none of 2, its only pixel being void.
    assert score_iou(counts).tolist() == pytest.approx([2 / 3, 0.0])
    assert score_semantic(counts) == pytest.approx({"miou": (2 / 3 + 0) / 2, "accuracy": 0.5})
    assert score_semantic(counts, slice(0, 1))["miou"] == pytest.approx(2 / 3)
    # When lenient the void pixel does not count, and with it category 1 is not in the truth.
    assert score_semantic(counts, lenient=True) == pytest.approx({"miou": 2 / 3, "accuracy": 2 / 3})


def test_counts_of_two_parts_of_a_set_add_up_to_those_of_the_whole() -> None:
    first = count_semantic(measure_overlap(THREE, {1: 0, 2: 1}, THREE, {1: 0, 3: 1}), 2)
    second = count_semantic(measure_overlap(THREE.copy(), {1: 1}, THREE, {1: 0, 2: 1}), 2)
    whole = weigh(stack([first, second]), np.ones(2))
    assert whole.true.tolist() == (first.true + second.true).tolist() == [8.0, 6.0]
    assert weigh(stack([first, second]), np.array([[2.0, 0.0]])).true.tolist() == [[8.0, 4.0]]
