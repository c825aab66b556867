"""Panoptic quality, semantic IoU, mask AP, and how sure they are."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.overlap import Overlap

_MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure in percent with its 95 % bootstrap interval over pictures."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PanopticCounts:
    """Per category."""

    iou: Float[np.ndarray, "C"]
    """Summed over matches."""
    matched: Int[np.ndarray, "C"]
    wrong: Int[np.ndarray, "C"]
    missed: Int[np.ndarray, "C"]


def count_panoptic(overlap: Overlap, categories: int) -> PanopticCounts:
    """Matches and errors of one picture, as panopticapi counts them.

    A pair of one category matches above an IoU of 0.5, void taken out of the union; an unmatched prediction that lies
    mostly on void or on a crowd of its category is no error. Of two crowds of a category only the last excuses, which
    is that program's quirk.
    """
    iou, matched = np.zeros(categories), np.zeros(categories, np.int64)
    wrong, missed = matched.copy(), matched.copy()
    areas, true_areas = overlap.pixels.sum(1), overlap.pixels.sum(0)
    is_met, is_found = np.zeros(len(overlap.predicted), bool), np.zeros(len(overlap.true), bool)
    for row, column in zip(*np.nonzero(overlap.pixels[1:, 1:]), strict=True):
        category = overlap.predicted[row]
        if overlap.is_crowd[column] or overlap.true[column] != category:
            continue
        shared = overlap.pixels[row + 1, column + 1]
        union = areas[row + 1] + true_areas[column + 1] - shared - overlap.pixels[row + 1, 0]
        if shared / union > _MATCH_IOU:
            iou[category] += shared / union
            matched[category] += 1
            is_met[row] = is_found[column] = True
    np.add.at(missed, overlap.true[~is_found & ~overlap.is_crowd], 1)
    crowds = {int(overlap.true[column]): column for column in np.flatnonzero(overlap.is_crowd)}
    for row in np.flatnonzero(~is_met):
        category = int(overlap.predicted[row])
        excused = overlap.pixels[row + 1, 0]
        if category in crowds:
            excused = excused + overlap.pixels[row + 1, crowds[category] + 1]
        wrong[category] += not excused / areas[row + 1] > _MATCH_IOU
    return PanopticCounts(iou=iou, matched=matched, wrong=wrong, missed=missed)


def score_panoptic(counts: Sequence[PanopticCounts], chosen: slice = slice(None)) -> dict[str, float]:
    """PQ, SQ and RQ in 0..1, the mean over those of the `chosen` categories that occur at all."""
    iou, matched, wrong, missed = (
        np.sum([getattr(each, name) for each in counts], axis=0)[chosen]
        for name in ("iou", "matched", "wrong", "missed")
    )
    weight = matched + wrong / 2 + missed / 2
    occurs = weight > 0
    if not occurs.any():
        return {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    iou, matched, weight = iou[occurs], matched[occurs], weight[occurs]
    return {
        "pq": float((iou / weight).mean()),
        "sq": float((iou / np.maximum(matched, 1)).mean()),
        "rq": float((matched / weight).mean()),
    }


def count_confusion(overlap: Overlap, categories: int) -> Int[np.ndarray, "C C+1"]:
    """Pixels by true category and predicted one, the last column holding those without one; true void is left out."""
    confusion = np.zeros((categories, categories + 1), np.int64)
    columns = np.concatenate([[categories], overlap.predicted])
    for place, category in enumerate(overlap.true):
        np.add.at(confusion[category], columns, overlap.pixels[:, place + 1])
    return confusion


def score_semantic(confusion: Int[np.ndarray, "C C+1"], chosen: slice = slice(None)) -> dict[str, float]:
    """Mean IoU over the `chosen` categories that are in the truth, and pixel accuracy over all, in 0..1."""
    square = confusion[:, :-1]
    right = np.diag(square)
    union = confusion.sum(1) + square.sum(0) - right
    iou = right / np.maximum(union, 1)
    occurs = confusion.sum(1)[chosen] > 0
    mean = float(iou[chosen][occurs].mean()) if occurs.any() else 0.0
    return {"miou": mean, "accuracy": float(right.sum() / max(1, confusion.sum()))}


def bootstrap(
    count: int, measure: Callable[[Int[np.ndarray, "N"]], dict[str, float]], *, draws: int, seed: int = 0
) -> dict[str, Interval]:
    """Each figure over all pictures, and between which values 95 % of resampled sets have it; in percent."""
    generator = np.random.default_rng(seed)
    values = measure(np.arange(count))
    drawn = [measure(generator.integers(count, size=count)) for _ in range(draws)]
    intervals = {}
    for key, value in values.items():
        low, high = np.percentile([each[key] for each in drawn], [2.5, 97.5])
        intervals[key] = Interval(value=round(100 * value, 2), low=round(100 * low, 2), high=round(100 * high, 2))
    return intervals


class MaskAp:
    """COCO's mask AP with all categories taken as one, number 1."""

    def __init__(self, truth: list[dict[str, Any]], results: list[dict[str, Any]], sizes: dict[int, list[int]]) -> None:
        """Annotations (without ids) and at least one result in COCO's words, masks as RLE; sizes are height, width."""
        images = [{"id": each, "height": height, "width": width} for each, (height, width) in sizes.items()]
        numbered = [{**annotation, "id": number} for number, annotation in enumerate(truth, start=1)]
        known = COCO()
        known.dataset = {"images": images, "annotations": numbered, "categories": [{"id": 1}], "info": {}}
        with contextlib.redirect_stdout(io.StringIO()):
            known.createIndex()
            self._evaluation = COCOeval(known, known.loadRes(results), "segm")
            self._evaluation.params.imgIds = list(sizes)
            self._evaluation.evaluate()
        self._per_image = list(self._evaluation.evalImgs)
        self._count = len(sizes)

    def score(self, chosen: Int[np.ndarray, "N"]) -> dict[str, float]:
        """AP, AP50 and AR100 in 0..1 over as many chosen pictures as there are; they may repeat."""
        areas = len(self._per_image) // self._count
        self._evaluation.evalImgs = [self._per_image[area * self._count + i] for area in range(areas) for i in chosen]
        with contextlib.redirect_stdout(io.StringIO()):
            self._evaluation.accumulate()
        precision = self._evaluation.eval["precision"][:, :, :, 0, -1]
        recall = self._evaluation.eval["recall"][:, :, 0, -1]
        return {
            "ap": float(np.maximum(precision, 0).mean()),
            "ap50": float(np.maximum(precision[0], 0).mean()),
            "ar100": float(np.maximum(recall, 0).mean()),
        }
