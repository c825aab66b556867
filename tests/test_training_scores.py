import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from model.encodings import decode_panoptic_png
from training.overlap import measure_overlap
from training.scores import MaskAp, bootstrap, count_confusion, count_panoptic, score_panoptic, score_semantic


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
    for key, chosen in (("all", slice(None)), ("things", things), ("stuff", ~things)):
        scores = score_panoptic(counts, chosen)  # type: ignore[arg-type]  # a boolean index chooses like a slice
        # The reference sums the same fractions in another order.
        assert scores == pytest.approx({name: expected[key][name] for name in ("pq", "sq", "rq")}, abs=1e-12)


def test_semantic_scores_of_a_confusion_known_by_hand() -> None:
    predicted = np.array([[1, 1, 2, 0]], np.int32)
    true = np.array([[1, 1, 1, 2]], np.int32)
    overlap = measure_overlap(predicted, {1: 0, 2: 1}, true, {1: 0, 2: 1})
    confusion = count_confusion(overlap, 2)
    assert confusion.tolist() == [[2, 1, 0], [0, 0, 1]]
    # Category 0: 2 of 3 pixels; category 1: none of 2, its only pixel being void.
    assert score_semantic(confusion) == pytest.approx({"miou": (2 / 3 + 0) / 2, "accuracy": 0.5})


def test_a_bootstrap_of_equal_pictures_has_no_width_and_is_repeatable() -> None:
    values = np.full(20, 0.25)
    interval = bootstrap(20, lambda drawn: {"mean": float(values[drawn].mean())}, draws=50)["mean"]
    assert (interval.value, interval.low, interval.high) == (25.0, 25.0, 25.0)
    spread = np.linspace(0, 1, 20)
    first, second = (bootstrap(20, lambda drawn: {"mean": float(spread[drawn].mean())}, draws=50) for _ in range(2))
    assert first == second
    assert first["mean"].low < 50.0 < first["mean"].high


def test_a_perfect_mask_has_ap_one_and_a_missed_picture_halves_it() -> None:
    mask = np.zeros((60, 60), np.uint8, order="F")
    mask[10:50, 10:50] = 1
    rle = coco.encode(mask)
    truth = {"category_id": 1, "segmentation": rle, "area": 1600, "bbox": [10, 10, 40, 40], "iscrowd": 0}
    result = {"image_id": 7, "category_id": 1, "segmentation": rle, "score": 0.4}
    scorer = MaskAp([truth | {"image_id": 7}, truth | {"image_id": 9}], [result], {7: [60, 60], 9: [60, 60]})
    assert scorer.score(np.array([0, 0])) == pytest.approx({"ap": 1.0, "ap50": 1.0, "ar100": 1.0})
    assert scorer.score(np.array([0, 1]))["ar100"] == pytest.approx(0.5)
    assert scorer.score(np.array([1, 1])) == pytest.approx({"ap": 0.0, "ap50": 0.0, "ar100": 0.0})
