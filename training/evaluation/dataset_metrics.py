"""Metrics of a dataset, from the results of its images and the mapping of clusters to categories."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from training.evaluation.class_mapping import CrossFittedMapping
from training.evaluation.cluster_matching import (
    LabelSpaces,
    MatchingConfig,
    count_cooccurrences,
    pairwise_xywh_iou,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluation_report import ClassMetrics, ClusterMetrics, ImageMetrics, InstanceMetrics
from training.evaluation.image_results import ImageResult
from training.evaluation.metrics.average_precision import (
    HEADLINE_METRICS,
    CocoEvaluator,
    IouType,
    to_coco_annotations,
    to_coco_results,
)
from training.evaluation.metrics.bootstrap import (
    MetricFunction,
    bootstrap,
    stack_counts,
    to_percent,
    weighted_sums,
)
from training.evaluation.metrics.miou import SemanticCounts, count_semantic, iou_per_class, semantic_quality
from training.evaluation.metrics.pq import (
    PanopticCounts,
    count_panoptic,
    count_unmapped,
    panoptic_quality,
    panoptic_quality_per_class,
)
from training.evaluation.overlap import map_predicted, merge_things, number_segments

Weights = Float[np.ndarray, "D N"]


def count_panoptic_all(
    results: Sequence[ImageResult], mapping: CrossFittedMapping, spaces: LabelSpaces
) -> PanopticCounts:
    """Return the panoptic counts of each image, each under its own mapping."""
    counts = []
    for position, result in enumerate(results):
        assert result.panoptic is not None, "the dataset has no segments"
        categories = mapping.for_image(position).categorize_panoptic(result)
        numbered = number_segments(result.panoptic)
        mapped = map_predicted(numbered, categories, spaces.num_things)
        unmapped = count_unmapped(numbered, categories, spaces.num_categories)
        counts.append(replace(count_panoptic(mapped, spaces.num_categories), unmapped=unmapped))
    return stack_counts(counts)


def count_semantic_all(
    results: Sequence[ImageResult], mapping: CrossFittedMapping, spaces: LabelSpaces, *, merged_things: bool = False
) -> SemanticCounts:
    """Return the semantic counts of each image, each under its own mapping; optionally with all things as one class."""
    num_categories = spaces.num_categories - spaces.num_things + 1 if merged_things else spaces.num_categories
    counts = []
    for position, result in enumerate(results):
        assert result.semantic is not None, "the dataset has no semantic labels"
        categories = mapping.for_image(position).categorize_semantic(result)
        overlap = map_predicted(number_segments(result.semantic), categories, spaces.num_things)
        if merged_things:
            overlap = merge_things(overlap, spaces.num_things)
        counts.append(count_semantic(overlap, num_categories))
    return stack_counts(counts)


def make_panoptic_metric(counts: PanopticCounts, num_things: int) -> MetricFunction:
    """Compute PQ, SQ and RQ of all categories, things, stuff, and of all with unmapped segments ignored."""

    def compute(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weighted_sums(counts, weights)
        metrics = panoptic_quality(summed)
        for name, categories in (("things", slice(0, num_things)), ("stuff", slice(num_things, None))):
            metrics |= {f"{key}_{name}": value for key, value in panoptic_quality(summed, categories).items()}
        ignoring = panoptic_quality(summed, ignore_unmapped=True)
        return metrics | {f"{key}_ignore_unmapped": value for key, value in ignoring.items()}

    return compute


def make_semantic_metric(counts: SemanticCounts, num_things: int | None) -> MetricFunction:
    """Compute mean IoU and accuracy, with and without unmapped pixels; given `num_things`, also the mean of stuff."""

    def compute(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weighted_sums(counts, weights)
        metrics = semantic_quality(summed)
        if num_things is not None:
            metrics["miou_stuff"] = semantic_quality(summed, slice(num_things, None))["miou"]
        ignoring = semantic_quality(summed, ignore_unmapped=True)
        return metrics | {f"{key}_ignore_unmapped": value for key, value in ignoring.items()}

    return compute


def instance_metrics(
    results: Sequence[ImageResult], mapping: CrossFittedMapping, dataset: GroundTruthDataset
) -> tuple[dict[str, InstanceMetrics], dict[int, float]]:
    """Return the metrics of boxes and masks, class-agnostic and by category, and the AP of each category in 0..1.

    The AP of a category is that of masks, or of boxes if only boxes are labeled.
    """
    if dataset.kind == "semantic":
        return {}, {}
    iou_types: tuple[IouType, ...] = ("bbox",) if dataset.kind == "boxes" else ("bbox", "segm")
    metrics, ap_per_category = {}, {}
    for iou_type in iou_types:
        for is_named in (False, True):
            evaluator = make_coco_evaluator(results, mapping, dataset, iou_type, is_named=is_named)
            values = evaluator.summarize()
            key = f"{'named' if is_named else 'agnostic'}_{'box' if iou_type == 'bbox' else 'mask'}"
            metrics[key] = InstanceMetrics(
                headline=bootstrap(len(results), evaluator.weighted_metrics),
                others={
                    name: value and to_percent(value) for name, value in values.items() if name not in HEADLINE_METRICS
                },
            )
            if is_named:
                ap_per_category = evaluator.ap_per_category()
    return metrics, ap_per_category


def make_coco_evaluator(
    results: Sequence[ImageResult],
    mapping: CrossFittedMapping,
    dataset: GroundTruthDataset,
    iou_type: IouType,
    *,
    is_named: bool,
) -> CocoEvaluator:
    """Match the objects of these images, by category if `is_named`, else with all categories as one."""
    num_categories = len(dataset.taxonomy.names)
    categories = np.arange(num_categories) if is_named else np.zeros(num_categories, np.int64)
    annotations, detections = [], []
    for position, result in enumerate(results):
        found = np.zeros(len(result.detections), np.int64)
        if is_named:
            found = mapping.for_image(position).categorize_detections(result)
        annotations += to_coco_annotations(result, categories)
        detections += to_coco_results(result, found, iou_type)
    sizes = {result.image_id: result.size for result in results}
    return CocoEvaluator(annotations, detections, sizes, range(num_categories) if is_named else [0], iou_type)


def class_metrics(
    dataset: GroundTruthDataset,
    panoptic: PanopticCounts | None,
    semantic: SemanticCounts | None,
    ap_per_category: dict[int, float],
) -> tuple[ClassMetrics, ...]:
    """Return the metrics of each category over all images."""
    quality = panoptic_quality_per_class(weighted_sums(panoptic, np.ones(len(panoptic.iou)))) if panoptic else None
    pixels = weighted_sums(semantic, np.ones(len(semantic.intersection))) if semantic else None
    iou = iou_per_class(pixels) if pixels else None
    return tuple(
        ClassMetrics(
            name=name,
            is_thing=dataset.taxonomy.is_thing(index),
            **{
                key: to_percent(quality[key][index]) if quality and quality["weight"][index] > 0 else None
                for key in ("pq", "sq", "rq")
            },
            iou=to_percent(iou[index]) if pixels and iou is not None and pixels.ground_truth[index] > 0 else None,
            ap=to_percent(ap_per_category[index]) if index in ap_per_category else None,
        )
        for index, name in enumerate(dataset.taxonomy.names)
    )


def cluster_metrics(
    results: Sequence[ImageResult],
    mapping: CrossFittedMapping,
    spaces: LabelSpaces,
    dataset: GroundTruthDataset,
    matching: MatchingConfig,
) -> tuple[ClusterMetrics, ...]:
    """Return the category of each cluster and the evidence for it over all images."""
    all_counts = count_cooccurrences(results, spaces, matching)
    counts = {"panoptic": all_counts.panoptic, "semantic": all_counts.semantic}.get(dataset.kind, all_counts.votes)
    names = dataset.taxonomy.names

    def describe(cluster: int) -> ClusterMetrics:
        support = int(counts[cluster].sum())
        indices = [int(each.panoptic[cluster]) for each in mapping.mappings]
        return ClusterMetrics(
            cluster=cluster,
            is_thing=cluster <= spaces.thing_clusters,
            support=support,
            purity=round(float(counts[cluster].max(initial=0) / max(1, support)), 4),
            categories=tuple(names[index] if index >= 0 else None for index in indices),
        )

    return tuple(describe(cluster) for cluster in range(1, len(counts)))


def image_metrics(
    results: Sequence[ImageResult],
    dataset: GroundTruthDataset,
    panoptic: PanopticCounts | None,
    semantic: SemanticCounts | None,
) -> tuple[ImageMetrics, ...]:
    """Return the quality of the prediction for each image."""
    if panoptic:
        errors = (panoptic.fp + panoptic.unmapped + panoptic.fn).sum(1) / 2
        qualities = panoptic.iou.sum(1) / np.maximum(panoptic.tp.sum(1) + errors, 0.5)
    elif semantic:
        qualities = semantic.intersection.sum(1) / np.maximum(semantic.ground_truth.sum(1), 1)
    else:
        qualities = np.array([_mean_best_iou(result) for result in results])
    return tuple(
        ImageMetrics(image_id=result.image_id, file=image.path.name, quality=to_percent(quality))
        for result, image, quality in zip(results, dataset.images, qualities, strict=True)
    )


def _mean_best_iou(result: ImageResult) -> float:
    """Return the mean over the objects of their best box IoU with a detection."""
    labeled = np.array([each.bbox for each in result.objects if not each.is_crowd], np.float64).reshape(-1, 4)
    detected = np.array([each.rle.bbox for each in result.detections], np.float64).reshape(-1, 4)
    if not len(labeled) or not len(detected):
        return 0.0
    return float(pairwise_xywh_iou(labeled, detected).max(1).mean())
