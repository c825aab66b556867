"""Metrics of a dataset as functions of image weights, bootstrap intervals, and the comparison of two predictors."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.evaluation.class_mapping import ClassMapping, ClassMappingConfig, map_clusters
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult, evaluate_all
from training.evaluation.overlap import (
    PanopticCounts,
    SemanticCounts,
    count_panoptic,
    count_semantic,
    map_predicted,
    panoptic_quality,
    semantic_quality,
)
from training.evaluation.predictors import Predictor

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
TITLES = {
    "pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff", "miou": "mIoU", "accuracy": "accuracy",
    **{name: name.upper() for name in HEADLINE_METRICS},
}  # fmt: skip
"""The metrics that are compared, and their titles."""
RESAMPLES = 1000
Weights = Float[np.ndarray, "D N"]
"""How often each image counts, one row per resample."""
MetricFunction = Callable[[Weights], dict[str, Float[np.ndarray, "D"]]]
"""Returns each metric (0..1) for every resample."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceInterval:
    """A metric in percent with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


def bootstrap(count: int, metrics: MetricFunction) -> dict[str, ConfidenceInterval]:
    """Return each metric over all `count` images with its 95 % percentile interval, in percent."""
    generator = np.random.default_rng(0)
    drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(RESAMPLES)]
    values, samples = metrics(np.ones((1, count))), metrics(np.array(drawn, np.float64))
    intervals = {}
    for name, value in values.items():
        low, high = np.percentile(samples[name], [2.5, 97.5])
        intervals[name] = ConfidenceInterval(value=to_percent(value[0]), low=to_percent(low), high=to_percent(high))
    return intervals


def to_percent(value: float) -> float:
    """Return a fraction in percent with two decimals."""
    return round(100.0 * float(value), 2)


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


def count_panoptic_all(
    results: Sequence[ImageResult], mappings: Sequence[ClassMapping], taxonomy: Taxonomy
) -> PanopticCounts:
    """Return the panoptic counts of each image, each under its own mapping."""
    counts = []
    for result, mapping in zip(results, mappings, strict=True):
        assert result.panoptic is not None, "the dataset has no segments"
        categories = mapping.categorize(mapping.panoptic, result.panoptic.predicted, result.panoptic.embeddings)
        mapped = map_predicted(result.panoptic, categories, taxonomy.num_things)
        counts.append(count_panoptic(mapped, len(taxonomy.names)))
    return PanopticCounts(*map(np.stack, zip(*counts, strict=True)))


def count_semantic_all(
    results: Sequence[ImageResult],
    mappings: Sequence[ClassMapping],
    taxonomy: Taxonomy,
    *,
    merged_things: bool = False,
) -> SemanticCounts:
    """Return the semantic counts of each image, each under its own mapping.

    With `merged_things`, all things are class 0, followed by the stuff categories (U2Seg: 16 classes on COCO).
    """
    classes = np.arange(len(taxonomy.names))
    if merged_things:
        classes = np.maximum(classes - taxonomy.num_things + 1, 0)
    table = np.append(classes, -1)  # -1, no category, stays -1
    counts = []
    for result, mapping in zip(results, mappings, strict=True):
        assert result.semantic is not None, "the dataset has no semantic labels"
        categories = mapping.categorize(mapping.semantic, result.semantic.predicted, result.semantic.embeddings)
        labeled = table[result.semantic.ground_truth]
        overlap = replace(result.semantic, predicted=table[categories], ground_truth=labeled)
        counts.append(count_semantic(overlap, classes[-1] + 1))
    return SemanticCounts(*map(np.stack, zip(*counts, strict=True)))


def panoptic_metrics(counts: PanopticCounts, num_things: int, weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
    """Return PQ, SQ and RQ of all categories, things, stuff, and of all with unmapped segments ignored."""
    summed = PanopticCounts(*(weights @ each for each in counts))
    metrics = panoptic_quality(summed)
    for name, categories in (("things", slice(0, num_things)), ("stuff", slice(num_things, None))):
        metrics |= {f"{key}_{name}": value for key, value in panoptic_quality(summed, categories).items()}
    ignoring = panoptic_quality(summed, ignore_unmapped=True)
    return metrics | {f"{key}_ignore_unmapped": value for key, value in ignoring.items()}


def semantic_metrics(
    counts: SemanticCounts, num_things: int | None, weights: Weights
) -> dict[str, Float[np.ndarray, "D"]]:
    """Return mean IoU and accuracy, with and without unmapped pixels; given `num_things`, also the mean of stuff."""
    summed = SemanticCounts(*(weights @ each for each in counts))
    metrics = semantic_quality(summed)
    if num_things is not None:
        metrics["miou_stuff"] = semantic_quality(summed, slice(num_things, None))["miou"]
    ignoring = semantic_quality(summed, ignore_unmapped=True)
    return metrics | {f"{key}_ignore_unmapped": value for key, value in ignoring.items()}


def make_coco_evaluator(
    results: Sequence[ImageResult], mappings: Sequence[ClassMapping], iou_type: IouType, *, is_named: bool
) -> CocoEvaluator:
    """Match the objects of these images, by category if `is_named`, else with all categories as one.

    Detections without a category are left out if `is_named`.
    """
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for result, mapping in zip(results, mappings, strict=True):
        annotations += [
            {
                "image_id": result.image_id,
                "category_id": labeled.category if is_named else 0,
                "area": labeled.area,
                "bbox": list(labeled.bbox),
                "iscrowd": int(labeled.is_crowd),
                "segmentation": labeled.rle,
            }
            for labeled in result.objects
        ]
        categories = _categorize_detections(result, mapping) if is_named else [0] * len(result.detections)
        for detection, category in zip(result.detections, categories, strict=True):
            shape: dict[str, Any] = {"bbox": list(detection.rle.bbox)}
            if iou_type == "segm":
                shape = {"segmentation": {"size": detection.rle.size, "counts": detection.rle.counts}}
            if category >= 0:
                detections.append(
                    {"image_id": result.image_id, "category_id": category, "score": detection.score, **shape}
                )
    images = [{"id": each.image_id, "height": each.size[0], "width": each.size[1]} for each in results]
    return CocoEvaluator(annotations, detections, images, iou_type)


def _categorize_detections(result: ImageResult, mapping: ClassMapping) -> list[int]:
    """Return the category index of each detection, -1 for none."""
    embeddings = [each.embedding for each in result.detections if each.embedding is not None]
    clusters = np.array([each.cluster for each in result.detections], np.int64)
    return list(mapping.categorize(mapping.panoptic, clusters, np.stack(embeddings) if embeddings else None))


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """One metric of both predictors, in percent, and new minus baseline with its 95 % interval."""

    new: float
    baseline: float
    difference: ConfidenceInterval


def compare_predictors(
    new: Predictor, baseline: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> dict[str, MetricDifference]:
    """Return the difference of every headline metric, by title; each resample has the same images for both."""
    new_metric, baseline_metric = (make_headline_metric(each, dataset, config) for each in (new, baseline))
    weights = np.ones((1, len(dataset.images)))
    new_values, baseline_values = new_metric(weights), baseline_metric(weights)

    def subtract(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        subtracted = baseline_metric(weights)
        return {name: value - subtracted[name] for name, value in new_metric(weights).items()}

    return {
        name: MetricDifference(
            new=to_percent(new_values[name][0]), baseline=to_percent(baseline_values[name][0]), difference=difference
        )
        for name, difference in bootstrap(len(dataset.images), subtract).items()
    }


def make_headline_metric(
    predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> MetricFunction:
    """Evaluate the predictor on all images and return the headline metrics as a function of image weights."""
    results, taxonomy = evaluate_all(predictor, dataset), dataset.taxonomy
    mappings, _ = map_clusters(results, predictor, dataset, config)
    metrics: list[MetricFunction] = []
    if dataset.kind == "panoptic":
        panoptic = count_panoptic_all(results, mappings, taxonomy)
        metrics.append(partial(panoptic_metrics, panoptic, taxonomy.num_things))
    if dataset.kind in ("panoptic", "semantic"):
        metrics.append(partial(semantic_metrics, count_semantic_all(results, mappings, taxonomy), None))
    if dataset.kind != "semantic":
        iou_type: IouType = "bbox" if dataset.kind == "boxes" else "segm"
        metrics.append(make_coco_evaluator(results, mappings, iou_type, is_named=False).weighted_metrics)
    return lambda weights: {
        TITLES[name]: value for metric in metrics for name, value in metric(weights).items() if name in TITLES
    }
