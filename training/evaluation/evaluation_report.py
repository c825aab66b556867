"""The report of an evaluation as data: all metrics of a predictor on a dataset."""

from dataclasses import dataclass
from pathlib import Path

from model.files import atomic_write
from model.validation import to_versioned_json
from training.evaluation.metrics.bootstrap import ConfidenceInterval

FORMAT_VERSION = 2
REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class MatchingSummary:
    """How clusters got their categories."""

    method: str
    fitted_on: str
    evaluated_on_fit_set: bool
    """If true, every metric by category is an upper bound."""
    clusters: int
    unmatched_clusters: int
    """Clusters that were predicted and have no category."""


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
class ClusterMetrics:
    """The category of one cluster, and the evidence for it over all images."""

    cluster: int
    is_thing: bool
    support: int
    """Ground-truth pixels, or votes."""
    purity: float
    """Fraction of them that belong to the most frequent category, 0..1."""
    categories: tuple[str | None, ...]
    """Its category in each fold."""


@dataclass(frozen=True, kw_only=True)
class ImageMetrics:
    """Quality of the prediction for one image."""

    image_id: int
    file: str
    quality: float
    """In percent: PQ over all its segments, its pixel accuracy, or the mean over its objects of the best box IoU."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The summary, and details by category, cluster and image."""

    summary: EvaluationSummary
    classes: tuple[ClassMetrics, ...]
    clusters: tuple[ClusterMetrics, ...]
    images: tuple[ImageMetrics, ...]

    def write(self, folder: Path) -> None:
        """Write `report.json`."""
        with atomic_write(folder / REPORT_FILE) as sibling:
            sibling.write_text(to_versioned_json(self, FORMAT_VERSION), encoding="utf-8")
