"""Two sources and the same pictures: is one better, or was it the pictures?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from training.evaluation.dataset_metrics import (
    Weights,
    count_panoptic_all,
    count_semantic_all,
    make_coco_evaluator,
    make_panoptic_metric,
    make_semantic_metric,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.image_results import evaluate_all, label_spaces
from training.evaluation.matching.class_mapping import MatchingConfig, map_clusters
from training.evaluation.metrics.average_precision import HEADLINE_METRICS, IouType
from training.evaluation.metrics.bootstrap import ConfidenceInterval, MetricFunction, bootstrap, to_percent
from training.evaluation.predictors import Predictor

TITLES = {
    "pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff", "miou": "mIoU", "accuracy": "accuracy",
    **{name: name.upper() for name in HEADLINE_METRICS},
}  # fmt: skip
"""The figures that are compared, and what they are called."""


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """One figure of both, in percent, and what the first has more, with its 95 % interval."""

    new: float
    old: float
    more: ConfidenceInterval


def compare_predictors(
    new: tuple[Predictor, MatchingConfig], old: tuple[Predictor, MatchingConfig], truth: GroundTruthDataset
) -> dict[str, MetricDifference]:
    """Every headline figure; each resampled set holds the same pictures for both."""
    later, earlier = (make_headline_metric(source, truth, plan) for source, plan in (new, old))
    whole = np.ones((1, len(truth.images)))
    after, before = later(whole), earlier(whole)
    return {
        name: MetricDifference(new=to_percent(after[name][0]), old=to_percent(before[name][0]), more=found)
        for name, found in bootstrap(len(truth.images), difference_metric(later, earlier)).items()
    }


def difference_metric(later: MetricFunction, earlier: MetricFunction) -> MetricFunction:
    """How much more the first is, figure by figure."""

    def differ(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        after, before = later(weights), earlier(weights)
        return {name: after[name] - before[name] for name in after}

    return differ


def make_headline_metric(source: Predictor, truth: GroundTruthDataset, plan: MatchingConfig) -> MetricFunction:
    """The headline figures of a source where pictures count so often; one pass over the photos."""
    comparisons = evaluate_all(source, truth)
    spaces = label_spaces(source, truth)
    fit = map_clusters(comparisons, truth, spaces, plan)
    measures: list[MetricFunction] = []
    if truth.kind == "panoptic":
        measures.append(make_panoptic_metric(count_panoptic_all(comparisons, fit, spaces), spaces.things))
    if truth.kind in ("panoptic", "semantic"):
        measures.append(make_semantic_metric(count_semantic_all(comparisons, fit, spaces), None))
    if truth.kind != "semantic":
        shape: IouType = "bbox" if truth.kind == "boxes" else "segm"
        measures.append(make_coco_evaluator(comparisons, fit, truth, shape, is_named=False).measure)
    return lambda weights: {
        TITLES[name]: each for measure in measures for name, each in measure(weights).items() if name in TITLES
    }
