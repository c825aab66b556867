"""What an evaluation says, as data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from model.files import replace_file
from training.scores.figures.intervals import Interval

FORMAT_VERSION = 1
REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class MatchingFacts:
    """How clusters got their categories."""

    method: str
    fitted_on: str
    scored_what_was_fitted: bool
    """True makes every figure with categories in it an upper bound."""
    clusters: int
    unmatched_clusters: int
    """Clusters that were predicted and have no category."""


@dataclass(frozen=True, kw_only=True)
class InstanceFigures:
    """pycocotools' figures in percent."""

    headline: dict[str, Interval]
    """AP, AP50, AP75, AR100."""
    others: dict[str, float | None]
    """AR1, AR10, and by size; None where there is no object to find."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All figures over the whole set, in percent, with 95 % bootstrap intervals over the pictures."""

    source: str
    source_sha256: str
    truth: str
    classes: str
    pictures: int
    photos_sha256: str
    protocol: str
    matching: MatchingFacts
    panoptic: dict[str, Interval]
    """Empty where the truth knows no segments; `_lenient`: segments of unmatched clusters cost nothing."""
    semantic: dict[str, Interval]
    """`_lenient`: pixels of unmatched clusters do not count."""
    semantic_things_as_one: dict[str, Interval]
    """All things one class beside the stuff: 16 classes on COCO."""
    instance: dict[str, InstanceFigures]
    """By `agnostic` (all categories as one) or `named`, and `box` or `mask`."""


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
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
class ClusterFacts:
    """One cluster."""

    cluster: int
    is_thing: bool
    met: int
    """True pixels, or votes, in all."""
    share: float
    """In 0..1: the part of them that is of the category most met."""
    categories: tuple[str | None, ...]
    """Its category in each fit."""


@dataclass(frozen=True, kw_only=True)
class PictureFigures:
    """One picture."""

    image_id: int
    file: str
    quality: float
    """In percent: its own PQ over all segments, its pixel accuracy, or its objects' mean best box IoU."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The summary and what lies behind it."""

    summary: Summary
    classes: tuple[ClassFigures, ...]
    clusters: tuple[ClusterFacts, ...]
    pictures: tuple[PictureFigures, ...]

    def write(self, folder: Path) -> None:
        """`report.json`."""
        with replace_file(folder / REPORT_FILE) as sibling:
            content = {"format_version": FORMAT_VERSION, **asdict(self)}
            sibling.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
