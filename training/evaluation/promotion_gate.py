"""Checks whether a new version may replace an old one: by metrics on a labeled dataset, else by similarity."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from cyclopts.validators import Number

from model.contract import Contract
from model.drift import BIN_EDGES, build_histograms, population_stability_index
from model.errors import ConfigError
from model.postprocessing.panoptic import Segmentation, output_statistics
from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.dataset_metrics import compare_predictors
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset
from training.evaluation.overlap import compute_overlap
from training.evaluation.predictors import Predictor
from training.option_types import Fraction, NonNegativeFloat, PositiveFloat

MIN_DRIFT_PHOTOS = 200
"""With fewer photos the population stability index exceeds its limit by chance."""

GATED_METRICS: Mapping[AnnotationKind, tuple[str, ...]] = {
    "panoptic": ("PQ", "AP"), "semantic": ("mIoU",), "masks": ("AP",), "boxes": ("AP",),
}  # fmt: skip
"""The metrics that are checked, by what the dataset labels."""


@dataclass(frozen=True, kw_only=True)
class PromotionThresholds:
    """Limits that a new version must keep."""

    max_score_drop: NonNegativeFloat = 1.0
    """Maximum drop of a metric in percentage points, on a labeled dataset."""
    min_covering: Fraction = 0.4
    """Minimum mean segmentation covering of the two versions' segments, 0..1, without a labeled dataset."""
    max_segment_ratio: Annotated[float, Parameter(validator=Number(gte=1.0))] = 2.0
    """Maximum ratio between the mean numbers of segments, 1 or more, without a labeled dataset."""
    max_void_increase: Fraction = 0.15
    """Maximum increase of the mean void fraction, 0..1, without a labeled dataset."""
    max_psi: PositiveFloat = 0.25
    """Maximum population stability index between the new version's drift reference and --drift-photos, above 0."""


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """The outcome of one check."""

    name: str
    value: float
    limit: float
    is_passed: bool
    reason: str
    """One line with the values."""


def check_scores(
    new: Predictor, old: Predictor, dataset: GroundTruthDataset, thresholds: PromotionThresholds
) -> list[GateCheck]:
    """Check the metrics of GATED_METRICS, with cross-fitted class mappings and class-agnostic AP.

    The difference is bootstrapped over the same images for both. A check passes if the new version is, with 97.5 %
    confidence, not worse by more than `max_score_drop`.
    """
    differences = compare_predictors(new, old, dataset, ClassMappingConfig())
    limit = -thresholds.max_score_drop
    checks = []
    for name in GATED_METRICS[dataset.kind]:
        found = differences[name].difference
        is_passed = found.low >= limit
        reason = f"{name} differs by {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f}), minimum {limit:+.2f}"
        if not is_passed and found.value >= limit:
            reason += f": {len(dataset.images)} images are too few to be certain"
        checks.append(GateCheck(name=name, value=found.low, limit=limit, is_passed=is_passed, reason=reason))
    return checks


def check_similarity(
    pairs: Iterable[tuple[Segmentation, Segmentation]], thresholds: PromotionThresholds
) -> list[GateCheck]:
    """Check the predictions of the old and the new version, in that order, for the same photos."""
    rows = []
    for old, new in pairs:
        before, after = output_statistics(old), output_statistics(new)
        covering = segmentation_covering(old, new)
        rows.append((covering, before["segments"], after["segments"], before["void"], after["void"]))
    covering, old_segments, new_segments, old_void, new_void = np.mean(rows, axis=0).tolist()
    ratio = max(new_segments, old_segments) / max(min(new_segments, old_segments), 1e-9)
    increase = new_void - old_void
    return [
        _check("covering", covering, thresholds.min_covering, f"segmentation covering is {covering:.2f}", "minimum"),
        _check(
            "segments", ratio, thresholds.max_segment_ratio,
            f"{old_segments:.1f} segments per photo became {new_segments:.1f}", "maximum ratio",
        ),
        _check("void", increase, thresholds.max_void_increase, f"void fraction changed by {increase:+.2f}"),
    ]  # fmt: skip


def check_drift(
    segmentations: Iterable[Segmentation], contract: Contract, thresholds: PromotionThresholds
) -> list[GateCheck]:
    """Check a version's predictions against its own drift reference.

    The photos must not be those of the reference, which would always agree. Raises ConfigError if the contract has no
    reference, or if there are fewer than MIN_DRIFT_PHOTOS.
    """
    if not contract.drift_reference:
        raise ConfigError(f"{contract.name} {contract.version} has no drift reference: run `useg drift-reference`")
    statistics = [output_statistics(segmentation) for segmentation in segmentations]
    if len(statistics) < MIN_DRIFT_PHOTOS:
        raise ConfigError(f"drift needs at least {MIN_DRIFT_PHOTOS} readable photos, got {len(statistics)}")
    histograms = build_histograms(statistics)
    checks = []
    for name in BIN_EDGES:
        reference, observed = contract.drift_reference.get(name), histograms[name]
        if reference and min(sum(reference.counts), sum(observed.counts)) > 0:
            psi = population_stability_index(reference, observed)
            reason = f"population stability index of {name} is {psi:.2f}"
            checks.append(_check(f"drift of {name}", psi, thresholds.max_psi, reason))
    return checks


def segmentation_covering(first: Segmentation, second: Segmentation) -> float:
    """Return the area-weighted IoU of the segments of one with the best of the other, averaged over both directions.

    Segmentation covering (Arbelaez et al., Contour Detection and Hierarchical Image Segmentation, section 2.3); void
    is not a segment. Two segmentations without segments have 1.
    """
    maps = [each.label_map.astype(np.int32) for each in (first, second)]
    classes = [{segment.id: 0 for segment in each.segments} for each in (first, second)]
    pixels = compute_overlap(maps[0], classes[0], maps[1], classes[1]).pixels
    rows, columns = pixels[1:].sum(1), pixels[:, 1:].sum(0)
    if not len(rows) or not len(columns):
        return float(len(rows) == len(columns))
    shared = pixels[1:, 1:]
    iou = shared / np.maximum(rows[:, None] + columns[None] - shared, 1)
    coverings = [(areas * iou.max(axis)).sum() / max(1, areas.sum()) for areas, axis in ((rows, 1), (columns, 0))]
    return float(np.mean(coverings))


def _check(name: str, value: float, limit: float, reason: str, kind: str = "maximum") -> GateCheck:
    is_passed = value >= limit if kind == "minimum" else value <= limit
    return GateCheck(
        name=name, value=round(value, 4), limit=limit, is_passed=is_passed, reason=f"{reason}, {kind} {limit:g}"
    )
