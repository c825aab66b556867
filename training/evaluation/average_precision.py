"""COCO's average precision and recall for boxes or masks, class-agnostic or by category, with bootstrap weights."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IouType = Literal["bbox", "segm"]
_ImageMatches = dict[str, Any] | None
"""An entry of COCOeval.evalImgs; None if the image has no object and no detection of the category."""
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium",
         "ar_large")  # fmt: skip
"""pycocotools' twelve metrics, in its order."""
HEADLINE_METRICS = ("ap", "ap50", "ap75", "ar100")
"""Metrics that get a confidence interval."""
_MAX_ARRAY_ELEMENTS = 4_000_000
"""Of one array of a bootstrap: 32 MB."""


class CocoEvaluator:
    """Matches detections with annotations by pycocotools, then computes metrics from the matches."""

    def __init__(
        self,
        annotations: Sequence[dict[str, Any]],
        results: list[dict[str, Any]],
        images: Sequence[dict[str, Any]],
        iou_type: IouType,
    ) -> None:
        """Takes COCO's annotations (numbered here), results of boxes or masks, and images."""
        ground_truth = COCO()
        ground_truth.dataset = {
            "images": images,
            "annotations": [{**each, "id": number} for number, each in enumerate(annotations, start=1)],
            "categories": [{"id": category} for category in sorted({each["category_id"] for each in annotations})],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth.createIndex()
            detections = ground_truth.loadRes(results) if results else COCO()
            self._evaluation = COCOeval(ground_truth, detections, iou_type)
            self._evaluation.evaluate()
        self._parameters = self._evaluation.params
        # By category, area range and image.
        size = len(self._parameters.areaRng) * len(images)
        matches = self._evaluation.evalImgs
        self._by_category = [matches[start : start + len(images)] for start in range(0, len(matches), size)]

    def summarize(self) -> dict[str, float | None]:
        """Return pycocotools' twelve metrics in 0..1; None where there are no objects."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._evaluation.accumulate()
            self._evaluation.summarize()
        return {
            name: None if value < 0 else float(value) for name, value in zip(STATS, self._evaluation.stats, strict=True)
        }

    def ap_per_category(self) -> dict[int, float]:
        """Return the AP in 0..1 of each category that has an object. Call `summarize` first."""
        precision = self._evaluation.eval["precision"][:, :, :, 0, -1]
        by_category = {category: precision[:, :, position] for position, category in enumerate(self._parameters.catIds)}
        return {category: float(each.mean()) for category, each in by_category.items() if (each > -1).all()}

    def weighted_metrics(self, weights: Float[np.ndarray, "D N"]) -> dict[str, Float[np.ndarray, "D"]]:
        """Return HEADLINE_METRICS for weighted images (in the order of their ids); undefined metrics are 0."""
        precision, recall = np.zeros((2, len(self._parameters.iouThrs), len(weights)))
        num_categories = np.zeros(len(weights))
        for matches in self._by_category:
            objects = weights @ np.array([(~each["gtIgnore"].astype(bool)).sum() if each else 0 for each in matches])
            num_categories += objects > 0
            if not any(each and each["dtScores"] for each in matches):
                continue
            ranking = _rank(matches)
            size = max(1, _MAX_ARRAY_ELEMENTS // len(ranking[0]))
            for rows in (slice(first, first + size) for first in range(0, len(weights), size)):
                values = _average_precision(*ranking, objects[rows], weights[rows], self._parameters.recThrs)
                precision[:, rows] += values[0]
                recall[:, rows] += values[1]
        divisor = np.maximum(num_categories, 1)
        return {
            "ap": precision.mean(0) / divisor,
            "ap50": precision[0] / divisor,  # the thresholds are 0.5, 0.55, … 0.95
            "ap75": precision[5] / divisor,
            "ar100": recall.mean(0) / divisor,
        }


def _rank(
    matches: list[_ImageMatches],
) -> tuple[Int[np.ndarray, "K"], Bool[np.ndarray, "T K"], Bool[np.ndarray, "T K"]]:
    """Return the position of each detection's image, best score first as in pycocotools.

    Also returns, for each IoU threshold, which detections are true positives, and which lie on a crowd: these are
    neither true nor false positives.
    """
    found = [(position, each) for position, each in enumerate(matches) if each and each["dtScores"]]
    order = np.argsort(-np.concatenate([each["dtScores"] for _, each in found]), kind="mergesort")
    images = np.repeat([position for position, _ in found], [len(each["dtScores"]) for _, each in found])
    is_matched, is_ignored = (
        np.concatenate([each[key] for _, each in found], axis=1)[:, order].astype(bool)
        for key in ("dtMatches", "dtIgnore")
    )
    return images[order], is_matched & ~is_ignored, is_ignored


def _average_precision(
    images: Int[np.ndarray, "K"],
    is_hit: Bool[np.ndarray, "T K"],
    is_ignored: Bool[np.ndarray, "T K"],
    objects: Float[np.ndarray, "D"],
    weights: Float[np.ndarray, "D N"],
    recall_levels: Float[np.ndarray, "R"],
) -> tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]:
    """Return average precision and maximum recall by threshold and row of weights; 0 where there are no objects."""
    precision, recall = np.zeros((2, len(is_hit), len(weights)))
    seen = np.cumsum(weights[:, images], axis=1)
    for row in range(len(is_hit)):
        hits, ignored = np.flatnonzero(is_hit[row]), np.flatnonzero(is_ignored[row])
        if not len(hits):
            continue
        counted = seen[:, hits]
        if len(ignored):
            skipped = np.cumsum(weights[:, images[ignored]], axis=1)
            before = np.searchsorted(ignored, hits)
            counted = counted - np.where(before > 0, skipped[:, before - 1], 0.0)
        tp = np.cumsum(weights[:, images[hits]], axis=1)
        reached = tp / np.maximum(objects, 1.0)[:, None]
        precision[row] = _interpolate(reached, tp / np.maximum(counted, 1.0), recall_levels) * (objects > 0)
        recall[row] = reached[:, -1] * (objects > 0)
    return precision, recall


def _interpolate(
    recall: Float[np.ndarray, "D H"], precision: Float[np.ndarray, "D H"], recall_levels: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "D"]:
    """Return the mean over the levels of the maximum precision at that recall or higher.

    Only true positives are considered, because precision falls between two of them.
    """
    count = recall.shape[1]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    rows = np.arange(len(recall))[:, None]
    found = np.searchsorted((recall + 2 * rows).ravel(), (recall_levels + 2 * rows).ravel(), side="left")
    positions = found.reshape(len(recall), len(recall_levels)) - rows * count
    best = envelope[rows, positions.clip(max=count - 1)] * (positions < count)
    mean: Float[np.ndarray, "D"] = best.sum(1) / len(recall_levels)
    return mean
