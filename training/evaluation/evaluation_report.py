"""The report of an evaluation as data: all metrics of a predictor on a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from model.files import replace_file
from model.validation import to_versioned_json
from training.evaluation.class_mapping import (
    ClassMapping,
    ClassMappingConfig,
    MatchingSummary,
    fingerprint_photos,
    map_clusters,
)
from training.evaluation.dataset_metrics import (
    HEADLINE_METRICS,
    ConfidenceInterval,
    IouType,
    bootstrap,
    count_panoptic_all,
    count_semantic_all,
    make_coco_evaluator,
    panoptic_metrics,
    semantic_metrics,
    to_percent,
)
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset
from training.evaluation.image_results import ImageResult
from training.evaluation.overlap import (
    PanopticCounts,
    SemanticCounts,
    iou_per_class,
    panoptic_quality_per_class,
)
from training.evaluation.predictors import MIN_SCORE, Predictor

FORMAT_VERSION = 3
REPORT_FILE = "report.json"
PROTOCOL = (
    "Things are matched among things and stuff among stuff. A segment of a cluster without a category is a false "
    "positive of the category that it covers most, and its pixels are errors; metrics that ignore unmapped clusters "
    "do not count it, as in the papers. Labeled and predicted stuff is one segment per category. Objects: "
    f"pycocotools, detections with a score of at least {MIN_SCORE}; detections without a category match no object of "
    "the metrics by category."
)


@dataclass(frozen=True, kw_only=True)
class InstanceMetrics:
    """pycocotools' metrics in percent."""

    headline: dict[str, ConfidenceInterval]
    """AP, AP50, AP75, AR100."""
    others: dict[str, float | None]
    """AR1, AR10, and by object size; None where there are no objects."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """The metrics over all images, in percent, with 95 % bootstrap intervals over images."""

    predictor: str
    predictor_sha256: str
    dataset: str
    classes: str
    images: int
    images_sha256: str
    protocol: str
    matching: MatchingSummary
    panoptic: dict[str, ConfidenceInterval]
    """Empty if the dataset has no segments; `_ignore_unmapped`: segments without a category are no errors."""
    semantic: dict[str, ConfidenceInterval]
    """`_ignore_unmapped`: pixels without a predicted category do not count."""
    semantic_merged_things: dict[str, ConfidenceInterval]
    """All things as one class beside the stuff categories: 16 classes on COCO."""
    instance: dict[str, InstanceMetrics]
    """By `agnostic` (all categories as one) or `named`, and `box` or `mask`: `agnostic_mask`."""
    skipped: tuple[str, ...] = ()
    """What was left out of the dataset's file, one line for each reason."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one category, in percent; None if it does not occur or is not measured."""

    name: str
    is_thing: bool
    pq: float | None = None
    sq: float | None = None
    rq: float | None = None
    iou: float | None = None
    ap: float | None = None
    """Of masks, or of boxes if only boxes are labeled."""


@dataclass(frozen=True, kw_only=True)
class ImageMetrics:
    """Quality of the prediction for one image."""

    image_id: int
    file: str
    quality: float
    """In percent: PQ over all its segments, its pixel accuracy, or the mean over its objects of the best box IoU."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The summary, and details by category and image."""

    summary: EvaluationSummary
    classes: tuple[ClassMetrics, ...]
    images: tuple[ImageMetrics, ...]

    def write(self, folder: Path) -> None:
        """Write `report.json`."""
        replace_file(folder / REPORT_FILE, to_versioned_json(self, FORMAT_VERSION))


def compute_report(
    results: Sequence[ImageResult], predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> tuple[EvaluationReport, list[ClassMapping]]:
    """Return all metrics that the dataset's labels allow, and the mapping of each image behind them."""
    taxonomy = dataset.taxonomy
    mappings, matching = map_clusters(results, predictor, dataset, config)
    panoptic = count_panoptic_all(results, mappings, taxonomy) if dataset.kind == "panoptic" else None
    is_dense = dataset.kind in ("panoptic", "semantic")
    semantic = count_semantic_all(results, mappings, taxonomy) if is_dense else None
    merged = count_semantic_all(results, mappings, taxonomy, merged_things=True) if is_dense else None
    instance, ap_per_category = instance_metrics(results, mappings, dataset.kind)
    summary = EvaluationSummary(
        predictor=predictor.title,
        predictor_sha256=predictor.digest,
        dataset=dataset.name,
        classes=taxonomy.title,
        images=len(results),
        images_sha256=fingerprint_photos(dataset.name, [result.digest for result in results]).sha256,
        protocol=PROTOCOL,
        matching=matching,
        panoptic=bootstrap(len(results), partial(panoptic_metrics, panoptic, taxonomy.num_things)) if panoptic else {},
        semantic=bootstrap(len(results), partial(semantic_metrics, semantic, taxonomy.num_things)) if semantic else {},
        semantic_merged_things=bootstrap(len(results), partial(semantic_metrics, merged, None)) if merged else {},
        instance=instance,
        skipped=dataset.skipped,
    )
    report = EvaluationReport(
        summary=summary,
        classes=class_metrics(dataset, panoptic, semantic, ap_per_category),
        images=image_metrics(results, dataset, panoptic, semantic),
    )
    return report, mappings


def instance_metrics(
    results: Sequence[ImageResult], mappings: Sequence[ClassMapping], kind: AnnotationKind
) -> tuple[dict[str, InstanceMetrics], dict[int, float]]:
    """Return the metrics of boxes and masks, class-agnostic and by category, and the AP of each category in 0..1.

    The AP of a category is that of masks, or of boxes if only boxes are labeled.
    """
    if kind == "semantic":
        return {}, {}
    iou_types: tuple[IouType, ...] = ("bbox",) if kind == "boxes" else ("bbox", "segm")
    metrics, ap_per_category = {}, {}
    for iou_type in iou_types:
        for is_named in (False, True):
            evaluator = make_coco_evaluator(results, mappings, iou_type, is_named=is_named)
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


def class_metrics(
    dataset: GroundTruthDataset,
    panoptic: PanopticCounts | None,
    semantic: SemanticCounts | None,
    ap_per_category: dict[int, float],
) -> tuple[ClassMetrics, ...]:
    """Return the metrics of each category over all images."""
    columns = {"ap": np.array([ap_per_category.get(index, np.nan) for index in range(len(dataset.taxonomy.names))])}
    if panoptic:
        quality = panoptic_quality_per_class(PanopticCounts(*(each.sum(0) for each in panoptic)))
        columns |= {key: np.where(quality["weight"] > 0, quality[key], np.nan) for key in ("pq", "sq", "rq")}
    if semantic:
        pixels = SemanticCounts(*(each.sum(0) for each in semantic))
        columns["iou"] = np.where(pixels.ground_truth > 0, iou_per_class(pixels), np.nan)
    return tuple(
        ClassMetrics(
            name=name,
            is_thing=dataset.taxonomy.is_thing(index),
            **{key: None if np.isnan(values[index]) else to_percent(values[index]) for key, values in columns.items()},
        )
        for index, name in enumerate(dataset.taxonomy.names)
    )


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
    return float(coco.iou(labeled, detected, np.zeros(len(detected), np.uint8)).max(1).mean())
