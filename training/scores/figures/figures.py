"""Comparisons and namings to figures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from training.scores.figures.intervals import Interval, Measure, bootstrap, stack, to_percent, weigh
from training.scores.figures.report import ClassFigures, ClusterFacts, InstanceFigures, PictureFigures
from training.scores.figures.scores import (
    PanopticCounts,
    SemanticCounts,
    count_panoptic,
    count_semantic,
    count_unnamed,
    score_iou,
    score_panoptic,
    score_panoptic_classes,
    score_semantic,
)
from training.scores.meetings.comparison import Comparison, count_tables, describe_results, describe_truth
from training.scores.meetings.instances import HEADLINES, Described, InstanceScorer, Shape
from training.scores.meetings.matching import Spaces, VoteThresholds, measure_box_iou
from training.scores.meetings.overlap import gather_classes, rename_predicted
from training.scores.naming.naming import Fit
from training.scores.sets.truth import Truth

Weights = Float[np.ndarray, "D N"]
_BATCH = 64
"""Pictures whose masks are in memory at a time."""


def count_panoptic_all(comparisons: Sequence[Comparison], fit: Fit, spaces: Spaces) -> PanopticCounts:
    """Panoptic counts of each picture, each under its own naming."""
    counts = []
    for place, each in enumerate(comparisons):
        assert each.panoptic is not None, "the truth knows no segments"
        table = fit.of(place).panoptic
        named = count_panoptic(rename_predicted(each.panoptic, table, spaces.things), spaces.categories)
        counts.append(replace(named, unnamed=count_unnamed(each.panoptic, table, spaces.categories)))
    return stack(counts)


def count_semantic_all(
    comparisons: Sequence[Comparison], fit: Fit, spaces: Spaces, *, things_as_one: bool = False
) -> SemanticCounts:
    """Semantic counts of each picture, each under its own naming."""
    counts = []
    for place, each in enumerate(comparisons):
        assert each.semantic is not None, "the truth knows no regions"
        overlap = rename_predicted(each.semantic, fit.of(place).semantic, spaces.things)
        if things_as_one:
            overlap = gather_classes(overlap, spaces.things)
        counts.append(
            count_semantic(overlap, spaces.categories - spaces.things + 1 if things_as_one else spaces.categories)
        )
    return stack(counts)


def measure_panoptic(counts: PanopticCounts, things: int) -> dict[str, Interval]:
    """What `open_panoptic` measures, with intervals."""
    return bootstrap(len(counts.iou), open_panoptic(counts, things))


def open_panoptic(counts: PanopticCounts, things: int) -> Measure:
    """PQ, SQ and RQ of everything, of things and of stuff, and all three with unmatched clusters for free."""

    def measure(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weigh(counts, weights)
        figures = score_panoptic(summed)
        for name, chosen in (("things", slice(0, things)), ("stuff", slice(things, None))):
            figures |= {f"{key}_{name}": value for key, value in score_panoptic(summed, chosen).items()}
        return figures | {f"{key}_lenient": value for key, value in score_panoptic(summed, lenient=True).items()}

    return measure


def measure_semantic(counts: SemanticCounts, things: int | None) -> dict[str, Interval]:
    """What `open_semantic` measures, with intervals."""
    return bootstrap(len(counts.right), open_semantic(counts, things))


def open_semantic(counts: SemanticCounts, things: int | None) -> Measure:
    """Mean IoU and accuracy, strict and lenient; with `things` also the mean over the stuff categories."""

    def measure(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        summed = weigh(counts, weights)
        figures = score_semantic(summed)
        if things is not None:
            figures["miou_stuff"] = score_semantic(summed, slice(things, None))["miou"]
        return figures | {f"{key}_lenient": value for key, value in score_semantic(summed, lenient=True).items()}

    return measure


def measure_instances(
    comparisons: Sequence[Comparison], fit: Fit, truth: Truth
) -> tuple[dict[str, InstanceFigures], dict[int, float]]:
    """Figures with all categories as one and by name, of boxes and of masks; and the AP of each category.

    The latter is of masks where the truth has them.
    """
    if truth.kind == "semantic":
        return {}, {}
    shapes: tuple[Shape, ...] = ("bbox",) if truth.kind == "boxes" else ("bbox", "segm")
    figures, precisions = {}, {}
    for shape in shapes:
        for is_named in (False, True):
            scorer = open_scorer(comparisons, fit, truth, shape, is_named=is_named)
            key = f"{'named' if is_named else 'agnostic'}_{'box' if shape == 'bbox' else 'mask'}"
            values = scorer.summarise()
            others = {name: value and to_percent(value) for name, value in values.items() if name not in HEADLINES}
            headline = bootstrap(len(comparisons), scorer.measure)
            figures[key] = InstanceFigures(headline=headline, others=others)
            if is_named:
                precisions = scorer.list_categories()
    return figures, precisions


def open_scorer(
    comparisons: Sequence[Comparison], fit: Fit, truth: Truth, shape: Shape, *, is_named: bool
) -> InstanceScorer:
    """What scores the objects of these pictures, with all categories as one or by name."""
    names = len(truth.taxonomy.names)
    categories = np.arange(names) if is_named else np.zeros(names, np.int64)

    def describe(start: int) -> Described:
        known, found, sizes = [], [], {}
        for place, each in enumerate(comparisons[start : start + _BATCH], start):
            table = fit.of(place).panoptic
            known += describe_truth(each, categories)
            found += describe_results(each, table if is_named else np.zeros(len(table), np.int64), shape)
            sizes[each.image_id] = each.size
        return Described(truth=known, results=found, sizes=sizes)

    batches = map(describe, range(0, len(comparisons), _BATCH))
    return InstanceScorer(batches, range(names) if is_named else [0], shape)


def list_classes(
    truth: Truth, panoptic: PanopticCounts | None, semantic: SemanticCounts | None, precisions: dict[int, float]
) -> tuple[ClassFigures, ...]:
    """Each category over the whole set."""
    segments = score_panoptic_classes(weigh(panoptic, np.ones(len(panoptic.iou)))) if panoptic else None
    regions = weigh(semantic, np.ones(len(semantic.right))) if semantic else None
    overlaps = score_iou(regions) if regions else None
    return tuple(
        ClassFigures(
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


def list_clusters(
    comparisons: Sequence[Comparison], fit: Fit, spaces: Spaces, truth: Truth, thresholds: VoteThresholds
) -> tuple[ClusterFacts, ...]:
    """What each cluster met on the whole set, and what it was called."""
    tables = count_tables(comparisons, spaces, thresholds)
    table = {"panoptic": tables.panoptic, "semantic": tables.semantic}.get(truth.kind, tables.votes)
    return tuple(
        ClusterFacts(
            cluster=cluster,
            is_thing=cluster <= spaces.thing_clusters,
            met=int(table[cluster].sum()),
            share=round(float(table[cluster].max(initial=0) / max(1, table[cluster].sum())), 4),
            categories=tuple(
                truth.taxonomy.names[place] if (place := int(naming.panoptic[cluster])) >= 0 else None
                for naming in fit.namings
            ),
        )
        for cluster in range(1, len(table))
    )


def list_pictures(
    comparisons: Sequence[Comparison], truth: Truth, panoptic: PanopticCounts | None, semantic: SemanticCounts | None
) -> tuple[PictureFigures, ...]:
    """How good each picture is by itself."""
    if panoptic:
        errors = (panoptic.wrong + panoptic.unnamed + panoptic.missed).sum(1) / 2
        qualities = panoptic.iou.sum(1) / np.maximum(panoptic.matched.sum(1) + errors, 0.5)
    elif semantic:
        qualities = semantic.right.sum(1) / np.maximum(semantic.true.sum(1), 1)
    else:
        qualities = np.array([_measure_recall(each) for each in comparisons])
    return tuple(
        PictureFigures(image_id=each.image_id, file=picture.path.name, quality=to_percent(quality))
        for each, picture, quality in zip(comparisons, truth.pictures, qualities, strict=True)
    )


def _measure_recall(each: Comparison) -> float:
    """The mean over the objects of their best box IoU with a detection."""
    true = np.array([found.bbox for found in each.objects if not found.is_crowd], np.float64).reshape(-1, 4)
    boxes = np.array([found.outline.bbox for found in each.detections], np.float64).reshape(-1, 4)
    if not len(true) or not len(boxes):
        return 0.0
    return float(measure_box_iou(true, boxes).max(1).mean())
