import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.evaluation.metrics.average_precision import CocoBatch, CocoEvaluator, IouType

STATS = {
    "AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large", "AR1": "ar1",
    "AR10": "ar10", "AR100": "ar100", "ARs": "ar_small", "ARm": "ar_medium", "ARl": "ar_large",
}  # fmt: skip


def open_golden(golden: Path, shape: IouType, *, is_agnostic: bool) -> CocoEvaluator:
    folder = golden / "coco_eval"
    truth = json.loads((folder / "gt.json").read_text())
    results = json.loads((folder / f"results_{shape}.json").read_text())
    known = [{**each, "category_id": 1} if is_agnostic else each for each in truth["annotations"]]
    found = [with_area(each) | ({"category_id": 1} if is_agnostic else {}) for each in results]
    return open_scorer(known, found, {each["id"]: (each["height"], each["width"]) for each in truth["images"]}, shape)


def open_scorer(
    known: list[dict[str, Any]],
    found: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    shape: IouType,
    batch: int = 5,
) -> CocoEvaluator:
    """So many pictures at a time."""
    order = sorted(sizes)

    def choose(entries: list[dict[str, Any]], images: list[int]) -> list[dict[str, Any]]:
        return [each for each in entries if each["image_id"] in images]

    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    batches = (
        CocoBatch(truth=choose(known, each), results=choose(found, each), sizes={image: sizes[image] for image in each})
        for each in groups
    )
    return CocoEvaluator(batches, sorted({each["category_id"] for each in [*known, *found]}), shape)


def with_area(result: dict[str, Any]) -> dict[str, Any]:
    if "bbox" in result:
        return {**result, "area": result["bbox"][2] * result["bbox"][3]}
    return {
        **result,
        "area": float(coco.area(result["segmentation"])),
        "bbox": coco.toBbox(result["segmentation"]).tolist(),
    }


@pytest.mark.golden
@pytest.mark.parametrize("shape", ["bbox", "segm"])
@pytest.mark.parametrize("is_agnostic", [False, True])
def test_all_twelve_figures_are_pycocotools(golden: Path, shape: IouType, is_agnostic: bool) -> None:
    key = f"{shape}_class_{'agnostic' if is_agnostic else 'aware'}"
    expected = json.loads((golden / "coco_eval" / "expected.json").read_text())[key]
    scorer = open_golden(golden, shape, is_agnostic=is_agnostic)
    figures = scorer.summarise()
    wanted = {STATS[name]: None if value < 0 else value for name, value in expected["stats"].items()}
    assert figures == pytest.approx(wanted, abs=1e-12)
    if not is_agnostic:
        per_category = {int(name): value for name, value in expected["AP_per_category"].items() if value >= 0}
        assert scorer.list_categories() == pytest.approx(per_category, abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("shape", ["bbox", "segm"])
@pytest.mark.parametrize("is_agnostic", [False, True])
def test_the_bootstrap_measures_what_pycocotools_does(golden: Path, shape: IouType, is_agnostic: bool) -> None:
    scorer = open_golden(golden, shape, is_agnostic=is_agnostic)
    figures = scorer.summarise()
    measured = scorer.measure(np.ones((3, 24)))
    for name in ("ap", "ap50", "ap75", "ar100"):
        assert measured[name] == pytest.approx([figures[name]] * 3, abs=1e-12)


@pytest.mark.golden
def test_a_picture_drawn_twice_counts_as_a_copy_of_it_would(golden: Path) -> None:
    folder = golden / "coco_eval"
    truth = json.loads((folder / "gt.json").read_text())
    results = json.loads((folder / "results_bbox.json").read_text())
    weights = np.random.default_rng(3).integers(0, 3, size=24)
    order = sorted(image["id"] for image in truth["images"])
    images, annotations, found = [], [], []
    for number, count in zip(order, weights, strict=True):
        for copy in range(count):
            new = 10_000_000 * (copy + 1) + number
            images.append({"id": new, "height": 480, "width": 640})
            annotations += [{**each, "image_id": new} for each in truth["annotations"] if each["image_id"] == number]
            found += [{**each, "image_id": new} for each in results if each["image_id"] == number]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": images,
            "annotations": [{**each, "id": place} for place, each in enumerate(annotations, start=1)],
            "categories": truth["categories"],
            "info": {},
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    measured = open_golden(golden, "bbox", is_agnostic=False).measure(weights[None].astype(float))
    names = {"ap": 0, "ap50": 1, "ap75": 2, "ar100": 8}
    assert {name: measured[name][0] for name in names} == pytest.approx(
        {name: evaluation.stats[place] for name, place in names.items()}, abs=1e-12
    )


def square(image: int, left: int, side: int = 40) -> dict[str, Any]:
    mask = np.zeros((60, 120), np.uint8, order="F")
    mask[10 : 10 + side, left : left + side] = 1
    rle = coco.encode(mask)
    return {
        "image_id": image,
        "category_id": 1,
        "segmentation": rle,
        "area": side * side,
        "bbox": [left, 10, side, side],
    }


def test_a_perfect_mask_has_ap_one_and_a_missed_picture_halves_the_recall() -> None:
    sizes = {7: (60, 120), 9: (60, 120)}
    scorer = open_scorer([square(7, 10), square(9, 10)], [{**square(7, 10), "score": 0.4}], sizes, "segm")
    measured = scorer.measure(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
    assert measured["ar100"].tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert measured["ap"].tolist() == pytest.approx([1.0, 51 / 101, 0.0])  # recall 0, 0.01 .. 0.5 is reached
    assert scorer.summarise()["ap_small"] is None  # 1,600 pixels are a medium object


def test_a_detection_on_a_group_counts_neither_way() -> None:
    group = {**square(1, 60, side=50), "iscrowd": 1}
    results = [{**square(1, 60), "score": 0.9}, {**square(1, 10), "score": 0.5}]
    scorer = open_scorer([square(1, 10), group], results, {1: (60, 120)}, "segm")
    assert scorer.summarise()["ap"] == pytest.approx(1.0)
    assert scorer.measure(np.ones((1, 1)))["ap"][0] == pytest.approx(1.0)


def test_without_any_detection_every_figure_is_zero() -> None:
    scorer = open_scorer([square(1, 10)], [], {1: (60, 120)}, "segm")
    assert scorer.summarise()["ar100"] == 0.0
    assert scorer.measure(np.ones((2, 1)))["ap"].tolist() == [0.0, 0.0]
