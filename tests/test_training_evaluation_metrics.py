"""Metrics and their bootstrap intervals, against panopticapi and pycocotools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.formats.image_files import decode_panoptic_png
from training.evaluation.dataset_metrics import HEADLINE_METRICS, STATS, CocoEvaluator, IouType, bootstrap
from training.evaluation.overlap import (
    PanopticCounts,
    compute_overlap,
    count_panoptic,
    panoptic_quality,
    panoptic_quality_per_class,
)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["synthetic", "coco"])
def test_panoptic_quality_equals_panopticapis(golden: Path, name: str) -> None:
    folder = golden / "panoptic_pq" / name
    ground_truth, prediction, expected = (
        json.loads((folder / file).read_text()) for file in ("gt.json", "pred.json", "expected.json")
    )
    categories = {category["id"]: index for index, category in enumerate(ground_truth["categories"])}
    things = np.array([category["isthing"] for category in ground_truth["categories"]], bool)
    predictions = {annotation["image_id"]: annotation for annotation in prediction["annotations"]}
    counts = []
    for annotation in ground_truth["annotations"]:
        predicted = predictions[annotation["image_id"]]
        overlap = compute_overlap(
            decode_panoptic_png((folder / "pred" / predicted["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in predicted["segments_info"]},
            decode_panoptic_png((folder / "gt" / annotation["file_name"]).read_bytes()),
            {segment["id"]: categories[segment["category_id"]] for segment in annotation["segments_info"]},
            frozenset(segment["id"] for segment in annotation["segments_info"] if segment["iscrowd"]),
        )
        counts.append(count_panoptic(overlap, len(categories)))
    summed = PanopticCounts(*map(sum, zip(*counts, strict=True)))
    for key, chosen in (("all", slice(None)), ("things", things), ("stuff", ~things)):
        scores = panoptic_quality(summed, chosen)  # type: ignore[arg-type]  # a boolean index chooses like a slice
        # The reference sums the same fractions in another order.
        assert scores == pytest.approx({name: expected[key][name] for name in ("pq", "sq", "rq")}, abs=1e-12)
    per_class = panoptic_quality_per_class(summed)
    for category_id, metrics in expected["per_class"].items():
        index = categories[int(category_id)]
        assert {key: per_class[key][index] for key in metrics} == pytest.approx(metrics, abs=1e-12)


def test_a_segment_of_an_unmapped_cluster_counts_at_the_category_that_it_covers_most_but_not_on_void() -> None:
    three = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 0, 0]], np.int32)
    counts = count_panoptic(compute_overlap(three, {1: 0, 2: -1, 3: -1}, three, {1: 0, 2: 1}), 2)
    assert counts.unmapped.tolist() == [0.0, 1.0]


def load_golden(golden: Path, iou_type: IouType, *, is_agnostic: bool) -> CocoEvaluator:
    folder = golden / "coco_eval"
    ground_truth = json.loads((folder / "gt.json").read_text())
    results = json.loads((folder / f"results_{iou_type}.json").read_text())
    for each in [*ground_truth["annotations"], *results] if is_agnostic else ():
        each["category_id"] = 1
    return CocoEvaluator(ground_truth["annotations"], results, ground_truth["images"], iou_type)


@pytest.mark.golden
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("is_agnostic", [False, True])
def test_all_twelve_metrics_equal_pycocotools(golden: Path, iou_type: IouType, is_agnostic: bool) -> None:
    key = f"{iou_type}_class_{'agnostic' if is_agnostic else 'aware'}"
    expected = json.loads((golden / "coco_eval" / "expected.json").read_text())[key]
    evaluator = load_golden(golden, iou_type, is_agnostic=is_agnostic)
    metrics = evaluator.summarize()
    stats = [None if value < 0 else value for value in expected["stats"].values()]
    assert metrics == pytest.approx(dict(zip(STATS, stats, strict=True)), abs=1e-12)
    weighted = evaluator.weighted_metrics(np.ones((3, 24)))
    for name in HEADLINE_METRICS:
        assert weighted[name] == pytest.approx([metrics[name]] * 3, abs=1e-12)
    if not is_agnostic:
        per_category = {int(name): value for name, value in expected["AP_per_category"].items() if value >= 0}
        assert evaluator.ap_per_category() == pytest.approx(per_category, abs=1e-12)


@pytest.mark.golden
def test_an_image_of_weight_two_counts_like_two_copies(golden: Path) -> None:
    folder = golden / "coco_eval"
    ground_truth = json.loads((folder / "gt.json").read_text())
    results = json.loads((folder / "results_bbox.json").read_text())
    weights = np.random.default_rng(3).integers(0, 3, size=24)
    counts = dict(zip(sorted(image["id"] for image in ground_truth["images"]), weights, strict=True))

    def repeat(entries: list[dict[str, Any]], key: str = "image_id") -> list[dict[str, Any]]:
        return [
            {**each, key: each[key] + 10_000_000 * copy}
            for copy in range(1, 3)
            for each in entries
            if copy <= counts[each[key]]
        ]

    images = repeat(ground_truth["images"], "id")
    expected = CocoEvaluator(repeat(ground_truth["annotations"]), repeat(results), images, "bbox").summarize()
    weighted = load_golden(golden, "bbox", is_agnostic=False).weighted_metrics(weights[None].astype(float))
    for name in HEADLINE_METRICS:
        assert weighted[name][0] == pytest.approx(expected[name], abs=1e-12)


def test_the_interval_is_repeatable_and_as_wide_as_theory_says() -> None:
    spread = np.linspace(0, 1, 100)
    first, second = (
        bootstrap(100, lambda weights: {"mean": weights @ spread / weights.sum(1)})["mean"] for _ in range(2)
    )
    assert first == second
    assert first.value == 50.0
    # The mean of 100 values of standard deviation 0.2916 has one of 2.916 points; 95 % lie within 1.96 of them.
    # With 1,000 resamples the ends of the interval are accurate to about a tenth of that.
    assert first.high - first.low == pytest.approx(2 * 1.96 * 2.916, rel=0.1)
