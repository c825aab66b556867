"""Whether a new version may take the place of an old one: by scores where truth is known, else by likeness."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.contract import Contract
from model.drift import STATISTICS, Statistic, build_histograms, output_statistics
from model.drift import population_stability_index as compare_histograms
from model.errors import ConfigError
from model.postprocessing.panoptic import Segmentation
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset
from training.evaluation.matching.class_mapping import MatchingConfig
from training.evaluation.overlap import compute_overlap
from training.evaluation.paired_comparison import compare_predictors
from training.evaluation.predictors import Predictor

MIN_DRIFT_IMAGES = 200
"""For a comparison with the reference: of fewer, chance alone makes an index that looks like drift."""

GATED_METRICS: Mapping[AnnotationKind, tuple[str, ...]] = {
    "panoptic": ("PQ", "AP"), "semantic": ("mIoU",), "masks": ("AP",), "boxes": ("AP",),
}  # fmt: skip
"""The figures that decide, by what the truth knows."""


@dataclass(frozen=True, kw_only=True)
class PromotionThresholds:
    """What a new version must keep."""

    margin: float = 1.0
    """Percentage points by which a score may be worse; where truth is known."""
    agreement: float = 0.4
    """Least mean IoU of a version's segments with the best ones of the other, by area, in 0..1; where it is not."""
    segments: float = 2.0
    """Most factor between the mean numbers of segments."""
    void: float = 0.15
    """Most rise of the mean share of void, in 0..1."""
    drift: float = 0.25
    """Most population stability index of the answers against the new version's own reference."""

    def __post_init__(self) -> None:
        for name in ("agreement", "void"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.margin < 0.0 or self.segments < 1.0 or self.drift <= 0.0:
            raise ConfigError("margin must be 0 or more, segments 1 or more, drift above 0")


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One thing that was held against the rule."""

    name: str
    value: float
    limit: float
    is_passed: bool
    reason: str
    """In words, with the figures."""


def check_scores(
    new: Predictor, old: Predictor, truth: GroundTruthDataset, rule: PromotionThresholds
) -> list[GateCheck]:
    """PQ of the panoptic map and AP of masks with all classes as one, as far as the truth knows them.

    Each half of the pictures names the other's clusters. The difference is bootstrapped over the same pictures for
    both: a check passes if with 97.5 % certainty the new version is not worse by more than the margin.
    """
    differences = compare_predictors((new, MatchingConfig()), (old, MatchingConfig()), truth)
    checks = []
    for name, found in ((name, differences[name].more) for name in GATED_METRICS[truth.kind]):
        is_passed = found.low >= -rule.margin
        told = f"{name} differs by {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
        known = "" if is_passed or found.value < -rule.margin else f": {len(truth.images)} pictures cannot tell more"
        reason = f"{told}, {-rule.margin:+.2f} is the least{known}"
        checks.append(GateCheck(name=name, value=found.low, limit=-rule.margin, is_passed=is_passed, reason=reason))
    return checks


def check_similarity(
    answers: Iterable[tuple[Segmentation, Segmentation]], contract: Contract, rule: PromotionThresholds
) -> list[GateCheck]:
    """Answers of the old and the new version to the same photos, in that order; `contract` is the new one's.

    Raises ConfigError if there are none.
    """
    agreements, before, after = [], [], []
    for old, new in answers:
        agreements.append(segmentation_covering(old, new))
        before.append(output_statistics(old))
        after.append(output_statistics(new))
    if not agreements:
        raise ConfigError("no photo was answered: give --photos a folder of photos")
    means = {name: (_average(before, name), _average(after, name)) for name in ("segments", "void")}
    agreement = float(np.mean(agreements))
    old_segments, new_segments = means["segments"]
    factor = max(new_segments, old_segments) / max(min(new_segments, old_segments), 1e-9)
    rise = means["void"][1] - means["void"][0]
    return [
        _limit("agreement", agreement, rule.agreement, f"segments agree to {agreement:.2f}", is_least=True),
        _limit("segments", factor, rule.segments, f"{old_segments:.1f} segments a photo became {new_segments:.1f}"),
        _limit("void", rise, rule.void, f"the share of void rose by {rise:+.2f}"),
        *_check_drift(after, contract, rule),
    ]


def segmentation_covering(first: Segmentation, second: Segmentation) -> float:
    """The mean of both ways round: the area-weighted IoU of one's segments with the best of the other's, 0..1.

    Segmentation covering (Arbelaez et al., Contour Detection and Hierarchical Image Segmentation, section 2.3), both
    ways; void is no segment. Two answers without any agree.
    """
    maps = [each.label_map.astype(np.int32) for each in (first, second)]
    segments = [{segment.id: 0 for segment in each.segments} for each in (first, second)]
    pixels = compute_overlap(maps[0], segments[0], maps[1], segments[1]).pixels
    rows, columns = pixels[1:].sum(1), pixels[:, 1:].sum(0)
    if not len(rows) or not len(columns):
        return float(len(rows) == len(columns))
    shared = pixels[1:, 1:]
    iou = shared / np.maximum(rows[:, None] + columns[None] - shared, 1)
    ways = [(areas * iou.max(axis)).sum() / max(1, areas.sum()) for areas, axis in ((rows, 1), (columns, 0))]
    return float(np.mean(ways))


def _check_drift(
    after: Sequence[dict[Statistic, float]], contract: Contract, rule: PromotionThresholds
) -> list[GateCheck]:
    if len(after) < MIN_DRIFT_IMAGES or not contract.reference:
        return []
    counted = build_histograms(after)
    checks = []
    for name in STATISTICS:
        reference, seen = contract.reference.get(name), counted[name]
        if reference and min(sum(reference.counts), sum(seen.counts)) > 0:
            index = compare_histograms(reference, seen)
            told = f"{name} drifts by {index:.2f} from the version's own reference"
            checks.append(_limit(f"drift of {name}", index, rule.drift, told))
    return checks


def _limit(name: str, value: float, limit: float, told: str, *, is_least: bool = False) -> GateCheck:
    is_passed = value >= limit if is_least else value <= limit
    reason = f"{told}, {limit:g} is the {'least' if is_least else 'most'}"
    return GateCheck(name=name, value=round(value, 4), limit=limit, is_passed=bool(is_passed), reason=reason)


def _average(measured: Sequence[dict[Statistic, float]], name: Statistic) -> float:
    return float(np.mean([each[name] for each in measured]))
