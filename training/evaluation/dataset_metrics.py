"""Comparisons and namings to figures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluation_report import ClassMetrics, ClusterMetrics, ImageMetrics, InstanceMetrics
from training.evaluation.image_results import ImageResult, count_cooccurrences, to_coco_annotations, to_coco_results
from training.evaluation.matching.class_mapping import CrossFittedMapping
from training.evaluation.matching.cluster_matching import LabelSpaces, VoteThresholds, pairwise_xywh_iou
from training.evaluation.metrics.average_precision import HEADLINE_METRICS, CocoBatch, CocoEvaluator, IouType
from training.evaluation.metrics.bootstrap import (
    ConfidenceInterval,
    MetricFunction,
    bootstrap,
    stack_counts,
    to_percent,
    weighted_sums,
)
from training.evaluation.metrics.pq import (
    PanopticCounts,
    SemanticCounts,
    count_panoptic,
    count_semantic,
    count_unmapped,
    iou_per_class,
    panoptic_quality,
    panoptic_quality_per_class,
    semantic_quality,
)
from training.evaluation.overlap import map_predicted, merge_things

Weights = Float[np.ndarray, "D N"]
_BATCH = 64
"""Pictures whose masks are in memory at a time."""


def count_panoptic_all(
    comparisons: Sequence[ImageResult], fit: CrossFittedMapping, spaces: LabelSpaces
) -> PanopticCounts:
    """Panoptic counts of each picture, each under its own naming."""
    counts = []
    for place, each in enumerate(comparisons):
        assert each.panoptic is not None, "the truth knows no segments"
        table = fit.of(place).panoptic
        named = count_panoptic(map_predicted(each.panoptic, table, spaces.things), spaces.categories)
        counts.append(replace(named, unnamed=count_unmapped(each.panoptic, table, spaces.categories)))
    return stack_counts(counts)


def count_semantic_all(
    comparisons: Sequence[ImageResult], fit: CrossFittedMapping, spaces: LabelSpaces, *, things_as_one: bool = False
) -> SemanticCounts:
    """Semantic counts of each picture, each under its own naming."""
    counts = []
    for place, each in enumerate(comparisons):
        assert each.semantic is not None, "the truth knows no regions"
        overlap = map_predicted(each.semantic, fit.of(place).semantic, spaces.things)
        if things_as_one:
            overlap = merge_things(overlap, spaces.things)
        counts.append(
            count_semantic(overlap, spaces.categories - spaces.things + 1 if things_as_one else spaces.categories)
        )
    return stack_counts(counts)


def panoptic_metrics(counts: PanopticCounts, things: int) -> dict[str, ConfidenceInterval]:
    """What `make_panoptic_metric` measures, with intervals."""
    return bootstrap(len(counts.iou), make_panoptic_metric(counts, things))


def make_panoptic_metric(counts: PanopticCounts, things: int) -> MetricFunction:
    """PQ, SQ and RQ of everything, of things and of stuff, and all three with unmatched clusters for free."""

    def measure(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weighted_sums(counts, weights)
        figures = panoptic_quality(summed)
        for name, chosen in (("things", slice(0, things)), ("stuff", slice(things, None))):
            figures |= {f"{key}_{name}": value for key, value in panoptic_quality(summed, chosen).items()}
        return figures | {f"{key}_lenient": value for key, value in panoptic_quality(summed, lenient=True).items()}

    return measure


def semantic_metrics(counts: SemanticCounts, things: int | None) -> dict[str, ConfidenceInterval]:
    """What `make_semantic_metric` measures, with intervals."""
    return bootstrap(len(counts.right), make_semantic_metric(counts, things))


def make_semantic_metric(counts: SemanticCounts, things: int | None) -> MetricFunction:
    """Mean IoU and accuracy, strict and lenient; with `things` also the mean over the stuff categories."""

    def measure(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weighted_sums(counts, weights)
        figures = semantic_quality(summed)
        if things is not None:
            figures["miou_stuff"] = semantic_quality(summed, slice(things, None))["miou"]
        return figures | {f"{key}_lenient": value for key, value in semantic_quality(summed, lenient=True).items()}

    return measure


def instance_metrics(
    comparisons: Sequence[ImageResult], fit: CrossFittedMapping, truth: GroundTruthDataset
) -> tuple[dict[str, InstanceMetrics], dict[int, float]]:
    """Figures with all categories as one and by name, of boxes and of masks; and the AP of each category.

    The latter is of masks where the truth has them.
    """
    if truth.kind == "semantic":
        return {}, {}
    shapes: tuple[IouType, ...] = ("bbox",) if truth.kind == "boxes" else ("bbox", "segm")
    figures, precisions = {}, {}
    for shape in shapes:
        for is_named in (False, True):
            scorer = make_coco_evaluator(comparisons, fit, truth, shape, is_named=is_named)
            key = f"{'named' if is_named else 'agnostic'}_{'box' if shape == 'bbox' else 'mask'}"
            values = scorer.summarise()
            others = {
                name: value and to_percent(value) for name, value in values.items() if name not in HEADLINE_METRICS
            }
            headline = bootstrap(len(comparisons), scorer.measure)
            figures[key] = InstanceMetrics(headline=headline, others=others)
            if is_named:
                precisions = scorer.list_categories()
    return figures, precisions


def make_coco_evaluator(
    comparisons: Sequence[ImageResult],
    fit: CrossFittedMapping,
    truth: GroundTruthDataset,
    shape: IouType,
    *,
    is_named: bool,
) -> CocoEvaluator:
    """What scores the objects of these pictures, with all categories as one or by name."""
    names = len(truth.taxonomy.names)
    categories = np.arange(names) if is_named else np.zeros(names, np.int64)

    def describe(start: int) -> CocoBatch:
        known, found, sizes = [], [], {}
        for place, each in enumerate(comparisons[start : start + _BATCH], start):
            table = fit.of(place).panoptic
            known += to_coco_annotations(each, categories)
            found += to_coco_results(each, table if is_named else np.zeros(len(table), np.int64), shape)
            sizes[each.image_id] = each.size
        return CocoBatch(truth=known, results=found, sizes=sizes)

    batches = map(describe, range(0, len(comparisons), _BATCH))
    return CocoEvaluator(batches, range(names) if is_named else [0], shape)


def class_metrics(
    truth: GroundTruthDataset,
    panoptic: PanopticCounts | None,
    semantic: SemanticCounts | None,
    precisions: dict[int, float],
) -> tuple[ClassMetrics, ...]:
    """Each category over the whole set."""
    segments = panoptic_quality_per_class(weighted_sums(panoptic, np.ones(len(panoptic.iou)))) if panoptic else None
    regions = weighted_sums(semantic, np.ones(len(semantic.right))) if semantic else None
    overlaps = iou_per_class(regions) if regions else None
    return tuple(
        ClassMetrics(
            name=name,
            is_thing=truth.taxonomy.is_thing(place),
            **{
                key: to_percent(segments[key][place]) if segments and segments["weight"][place] > 0 else None
                for key in ("pq", "sq", "rq")
            },
            iou=to_percent(overlaps[place]) if regions and overlaps is not None and regions.true[place] > 0 else None,
            ap=to_percent(precisions[place]) if place in precisions else None,
        )
        for place, name in enumerate(truth.taxonomy.names)
    )


def cluster_metrics(
    comparisons: Sequence[ImageResult],
    fit: CrossFittedMapping,
    spaces: LabelSpaces,
    truth: GroundTruthDataset,
    thresholds: VoteThresholds,
) -> tuple[ClusterMetrics, ...]:
    """What each cluster met on the whole set, and what it was called."""
    tables = count_cooccurrences(comparisons, spaces, thresholds)
    table = {"panoptic": tables.panoptic, "semantic": tables.semantic}.get(truth.kind, tables.votes)
    return tuple(
        ClusterMetrics(
            cluster=cluster,
            is_thing=cluster <= spaces.thing_clusters,
            support=int(table[cluster].sum()),
            purity=round(float(table[cluster].max(initial=0) / max(1, table[cluster].sum())), 4),
            categories=tuple(
                truth.taxonomy.names[place] if (place := int(naming.panoptic[cluster])) >= 0 else None
                for naming in fit.namings
            ),
        )
        for cluster in range(1, len(table))
    )


def image_metrics(
    comparisons: Sequence[ImageResult],
    truth: GroundTruthDataset,
    panoptic: PanopticCounts | None,
    semantic: SemanticCounts | None,
) -> tuple[ImageMetrics, ...]:
    """How good each picture is by itself."""
    if panoptic:
        errors = (panoptic.wrong + panoptic.unnamed + panoptic.missed).sum(1) / 2
        qualities = panoptic.iou.sum(1) / np.maximum(panoptic.matched.sum(1) + errors, 0.5)
    elif semantic:
        qualities = semantic.right.sum(1) / np.maximum(semantic.true.sum(1), 1)
    else:
        qualities = np.array([_measure_recall(each) for each in comparisons])
    return tuple(
        ImageMetrics(image_id=each.image_id, file=picture.path.name, quality=to_percent(quality))
        for each, picture, quality in zip(comparisons, truth.images, qualities, strict=True)
    )


def _measure_recall(each: ImageResult) -> float:
    """The mean over the objects of their best box IoU with a detection."""
    true = np.array([found.bbox for found in each.objects if not found.is_crowd], np.float64).reshape(-1, 4)
    boxes = np.array([found.outline.bbox for found in each.detections], np.float64).reshape(-1, 4)
    if not len(true) or not len(boxes):
        return 0.0
    return float(pairwise_xywh_iou(true, boxes).max(1).mean())
