"""What an evaluation says, as data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from model.files import atomic_write
from training.evaluation.metrics.bootstrap import ConfidenceInterval

FORMAT_VERSION = 1
REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class MatchingSummary:
    """How clusters got their categories."""

    method: str
    fitted_on: str
    evaluated_on_fit_set: bool
    """True makes every figure with categories in it an upper bound."""
    clusters: int
    unmatched_clusters: int
    """Clusters that were predicted and have no category."""


@dataclass(frozen=True, kw_only=True)
class InstanceMetrics:
    """pycocotools' figures in percent."""

    headline: dict[str, ConfidenceInterval]
    """AP, AP50, AP75, AR100."""
    others: dict[str, float | None]
    """AR1, AR10, and by size; None where there is no object to find."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """All figures over the whole set, in percent, with 95 % bootstrap intervals over the pictures."""

    source: str
    source_sha256: str
    truth: str
    classes: str
    images: int
    photos_sha256: str
    protocol: str
    matching: MatchingSummary
    panoptic: dict[str, ConfidenceInterval]
    """Empty where the truth knows no segments; `_lenient`: segments of unmatched clusters cost nothing."""
    semantic: dict[str, ConfidenceInterval]
    """`_lenient`: pixels of unmatched clusters do not count."""
    semantic_things_as_one: dict[str, ConfidenceInterval]
    """All things one class beside the stuff: 16 classes on COCO."""
    instance: dict[str, InstanceMetrics]
    """By `agnostic` (all categories as one) or `named`, and `box` or `mask`."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One category, in percent; None where it does not occur or is not measured."""

    name: str
    is_thing: bool
    pq: float | None = None
    sq: float | None = None
    rq: float | None = None
    iou: float | None = None
    ap: float | None = None
    """Of masks, or of boxes where only they are known."""


@dataclass(frozen=True, kw_only=True)
class ClusterMetrics:
    """One cluster."""

    cluster: int
    is_thing: bool
    support: int
    """True pixels, or votes, in all."""
    purity: float
    """In 0..1: the part of them that is of the category most met."""
    categories: tuple[str | None, ...]
    """Its category in each fit."""


@dataclass(frozen=True, kw_only=True)
class ImageMetrics:
    """One picture."""

    image_id: int
    file: str
    quality: float
    """In percent: its own PQ over all segments, its pixel accuracy, or its objects' mean best box IoU."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The summary and what lies behind it."""

    summary: EvaluationSummary
    classes: tuple[ClassMetrics, ...]
    clusters: tuple[ClusterMetrics, ...]
    images: tuple[ImageMetrics, ...]

    def write(self, folder: Path) -> None:
        """`report.json`."""
        with atomic_write(folder / REPORT_FILE) as sibling:
            content = {"format_version": FORMAT_VERSION, **asdict(self)}
            sibling.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
