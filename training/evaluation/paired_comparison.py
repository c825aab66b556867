"""Compares two predictors on the same images by paired bootstrap."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from training.evaluation.class_mapping import ClassMappingConfig, map_clusters
from training.evaluation.cluster_matching import MatchingConfig, label_spaces
from training.evaluation.dataset_metrics import (
    Weights,
    count_panoptic_all,
    count_semantic_all,
    make_coco_evaluator,
    make_panoptic_metric,
    make_semantic_metric,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.image_results import evaluate_all
from training.evaluation.metrics.average_precision import HEADLINE_METRICS, IouType
from training.evaluation.metrics.bootstrap import ConfidenceInterval, MetricFunction, bootstrap, to_percent
from training.evaluation.predictors import Predictor

TITLES = {
    "pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff", "miou": "mIoU", "accuracy": "accuracy",
    **{name: name.upper() for name in HEADLINE_METRICS},
}  # fmt: skip
"""The metrics that are compared, and their titles."""


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """One metric of both predictors, in percent, and new minus baseline with its 95 % interval."""

    new: float
    baseline: float
    difference: ConfidenceInterval


def compare_predictors(
    new: Predictor, baseline: Predictor, dataset: GroundTruthDataset, matching: MatchingConfig
) -> dict[str, MetricDifference]:
    """Return the difference of every headline metric, by title; each resample has the same images for both."""
    new_metric, baseline_metric = (make_headline_metric(each, matching, dataset) for each in (new, baseline))
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


def make_headline_metric(predictor: Predictor, matching: MatchingConfig, dataset: GroundTruthDataset) -> MetricFunction:
    """Evaluate the predictor on all images and return the headline metrics as a function of image weights."""
    results = evaluate_all(predictor, dataset)
    spaces = label_spaces(predictor, dataset)
    mapping = map_clusters(results, dataset, spaces, ClassMappingConfig(matching=matching))
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
