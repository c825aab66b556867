"""Metrics of a dataset as functions of image weights, and the comparison of two predictors by paired bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from training.evaluation.auxiliary_images import AuxiliaryImages
from training.evaluation.class_mapping import ClassMappingConfig, CrossFittedMapping, map_clusters
from training.evaluation.cluster_matching import LabelSpaces, MatchingConfig, label_spaces
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.image_results import ImageResult, evaluate_all
from training.evaluation.metrics.average_precision import (
    HEADLINE_METRICS,
    CocoEvaluator,
    IouType,
    to_coco_annotations,
    to_coco_results,
)
from training.evaluation.metrics.bootstrap import (
    ConfidenceInterval,
    MetricFunction,
    bootstrap,
    stack_counts,
    to_percent,
    weighted_sums,
)
from training.evaluation.metrics.segmentation import (
    PanopticCounts,
    SemanticCounts,
    count_panoptic,
    count_semantic,
    count_unmapped,
    panoptic_quality,
    semantic_quality,
)
from training.evaluation.overlap import map_predicted, merge_things, number_segments
from training.evaluation.predictors import Predictor

TITLES = {
    "pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff", "miou": "mIoU", "accuracy": "accuracy",
    **{name: name.upper() for name in HEADLINE_METRICS},
}  # fmt: skip
"""The metrics that are compared, and their titles."""
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


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """One metric of both predictors, in percent, and new minus baseline with its 95 % interval."""

    new: float
    baseline: float
    difference: ConfidenceInterval


def compare_predictors(
    new: Predictor,
    baseline: Predictor,
    dataset: GroundTruthDataset,
    matching: MatchingConfig,
    auxiliary: AuxiliaryImages | None = None,
) -> dict[str, MetricDifference]:
    """Return the difference of every headline metric, by title; each resample has the same images for both."""
    new_metric, baseline_metric = (
        make_headline_metric(
            each,
            ClassMappingConfig(matching=matching, auxiliary=auxiliary.evaluate(each) if auxiliary else None),
            dataset,
        )
        for each in (new, baseline)
    )
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
    predictor: Predictor, config: ClassMappingConfig, dataset: GroundTruthDataset
) -> MetricFunction:
    """Evaluate the predictor on all images and return the headline metrics as a function of image weights."""
    results = evaluate_all(predictor, dataset)
    spaces = label_spaces(predictor, dataset)
    mapping = map_clusters(results, dataset, spaces, config)
    metrics: list[MetricFunction] = []
    if dataset.kind == "panoptic":
        metrics.append(make_panoptic_metric(count_panoptic_all(results, mapping, spaces), spaces.num_things))
    if dataset.kind in ("panoptic", "semantic"):
        metrics.append(make_semantic_metric(count_semantic_all(results, mapping, spaces), None))
    if dataset.kind != "semantic":
        iou_type: IouType = "bbox" if dataset.kind == "boxes" else "segm"
        metrics.append(make_coco_evaluator(results, mapping, dataset, iou_type, is_named=False).weighted_metrics)
    return lambda weights: {
        TITLES[name]: value for metric in metrics for name, value in metric(weights).items() if name in TITLES
    }
