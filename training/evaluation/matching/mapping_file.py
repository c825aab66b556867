"""The file that names clusters: cluster to category, and what that was fitted on."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from model.contract import Category, reject_unknown
from model.errors import ConfigError
from model.files import atomic_write
from training.choices import MAPPING_METHODS, MappingMethod
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.matching.cluster_matching import UNMATCHED, LabelSpaces, VoteThresholds

FORMAT_VERSION = 1
_DIGITS = 16
"""Of a photo's sha256: enough to know it again."""


@dataclass(frozen=True, kw_only=True)
class FittedOn:
    """The labelled set behind the names."""

    truth: str
    """Its name."""
    images: int
    sha256: str
    """Over the hashes of all its photos."""
    photos: tuple[str, ...]
    """The first digits of each photo's sha256, sorted."""

    def count_overlap(self, digests: Iterable[str]) -> int:
        """How many of the photos with these hashes are among them."""
        return len(set(self.photos) & {each[:_DIGITS] for each in digests})


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """One cluster's category, and on what it rests."""

    category: int | None
    """An id of `categories`; None if the cluster met none."""
    purity: float
    """Of what the cluster met, in 0..1, the part that was this category's."""
    support: int
    """Pixels, or votes, in all."""


@dataclass(frozen=True, kw_only=True)
class ClusterMapping:
    """Names for the clusters of one source."""

    source: str
    """The hash of whatever made the clusters: an artifact, a run or a codebook."""
    method: MappingMethod
    thresholds: VoteThresholds | None
    """Of the votes; None where pixels were counted."""
    fitted_on: FittedOn
    thing_clusters: int
    stuff_clusters: int
    things: int
    """The first so many categories are things."""
    categories: tuple[Category, ...]
    clusters: dict[int, ClusterAssignment]

    def make_table(self) -> Int[np.ndarray, "N"]:
        """Cluster to the place of its category, UNMATCHED for one without; entry 0 is unused."""
        places = {category.id: place for place, category in enumerate(self.categories)}
        table = np.full(self.thing_clusters + self.stuff_clusters + 1, UNMATCHED, np.int64)
        for cluster, found in self.clusters.items():
            if found.category is not None:
                table[cluster] = places[found.category]
        return table

    def write(self, path: Path) -> None:
        """As JSON."""
        with atomic_write(path) as sibling:
            content = {"format_version": FORMAT_VERSION, **asdict(self)}
            sibling.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint_photos(truth: str, digests: Sequence[str]) -> FittedOn:
    """A set by the sha256 of each of its photos."""
    joined = sha256("\n".join(sorted(digests)).encode()).hexdigest()
    photos = tuple(sorted(each[:_DIGITS] for each in digests))
    return FittedOn(truth=truth, images=len(photos), sha256=joined, photos=photos)


def make_cluster_mapping(
    table: Int[np.ndarray, "N C"],
    matched: Int[np.ndarray, "N"],
    *,
    source: str,
    method: MappingMethod,
    thresholds: VoteThresholds | None,
    fitted_on: FittedOn,
    spaces: LabelSpaces,
    taxonomy: Taxonomy,
) -> ClusterMapping:
    """Names from a table of meetings and what was matched in it; categories are numbered from 1."""
    clusters = {
        cluster: ClusterAssignment(
            category=int(matched[cluster]) + 1 if matched[cluster] != UNMATCHED else None,
            purity=round(float(table[cluster, matched[cluster]] / max(1, table[cluster].sum())), 4)
            if matched[cluster] != UNMATCHED
            else 0.0,
            support=int(table[cluster].sum()),
        )
        for cluster in range(1, len(table))
    }
    return ClusterMapping(
        source=source,
        method=method,
        thresholds=thresholds,
        fitted_on=fitted_on,
        thing_clusters=spaces.thing_clusters,
        stuff_clusters=spaces.stuff_clusters,
        things=spaces.things,
        categories=tuple(Category(id=number, name=name) for number, name in enumerate(taxonomy.names, start=1)),
        clusters=clusters,
    )


def read_mapping(path: Path) -> ClusterMapping:
    """Raises ConfigError, naming the file, if it holds no names that this version understands."""
    try:
        content = json.loads(path.read_bytes())
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this release reads {FORMAT_VERSION}")
        reject_unknown(content, ClusterMapping)
        return _parse(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path} is no file of names: {error}") from error


def _parse(content: dict[str, Any]) -> ClusterMapping:
    thresholds = content.pop("thresholds")
    fitted_on = content.pop("fitted_on")
    categories = tuple(Category(**each) for each in content.pop("categories"))
    clusters = {int(cluster): ClusterAssignment(**found) for cluster, found in content.pop("clusters").items()}
    names = ClusterMapping(
        thresholds=VoteThresholds(**thresholds) if thresholds else None,
        fitted_on=FittedOn(**{**fitted_on, "photos": tuple(fitted_on["photos"])}),
        categories=categories,
        clusters=clusters,
        **content,
    )
    if names.method not in MAPPING_METHODS:
        raise ValueError(f"unknown method {names.method!r}")
    known = {category.id for category in categories}
    wrong = [c for c, found in clusters.items() if found.category is not None and found.category not in known]
    if wrong or not set(clusters) <= set(range(1, names.thing_clusters + names.stuff_clusters + 1)):
        raise ValueError(f"clusters {sorted(wrong or clusters)[:5]} do not fit its categories or counts")
    return names
