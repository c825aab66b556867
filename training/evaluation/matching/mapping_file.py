"""The mapping file that `useg match` writes: the category of each cluster, and the images it was fitted on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from model.category_examples import Category, CategoryExamples
from model.errors import ConfigError
from model.files import atomic_write
from model.validation import parse_versioned_json, to_versioned_json
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.matching.cluster_matching import UNMATCHED, LabelSpaces, MatchingConfig, MatchingMethod

FORMAT_VERSION = 3
_DIGEST_DIGITS = 16
"""Digits of an image's sha256 that are stored: enough to recognize it."""
MappingMethod = Literal[MatchingMethod, "given"]
"""How a mapping was made: by matching, or because clusters are categories."""


@dataclass(frozen=True, kw_only=True)
class FittedOn:
    """The labeled images that a mapping was fitted on."""

    dataset: str
    """Name of the dataset."""
    images: int
    sha256: str
    """Hash over the hashes of all images."""
    image_digests: tuple[str, ...]
    """The first digits of each image's sha256, sorted."""

    def count_overlap(self, digests: Iterable[str]) -> int:
        """Return how many of the images with these sha256 are among them."""
        return len(set(self.image_digests) & {digest[:_DIGEST_DIGITS] for digest in digests})


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """The category of one cluster, and the evidence for it."""

    category: int | None
    """An id of `categories`; None if the cluster has no category."""
    purity: float
    """Fraction of the cluster's counts that belong to its category, 0..1."""
    support: int
    """Sum of the cluster's counts: pixels or votes."""


@dataclass(frozen=True, kw_only=True)
class ClusterMapping:
    """Categories for the clusters of one predictor."""

    source: str
    """Hash of what defines the clusters: the weights, or the codebook."""
    method: MappingMethod
    matching: MatchingConfig | None
    """Settings of the matching; None for `given`."""
    fitted_on: FittedOn
    thing_clusters: int
    stuff_clusters: int
    num_things: int
    """The first `num_things` categories are things."""
    categories: tuple[Category, ...]
    clusters: dict[int, ClusterAssignment]
    examples: CategoryExamples | None = None
    """Labeled segments, for the method `neighbors`: segments take the category of the most similar ones."""

    def __post_init__(self) -> None:
        known = {None, *(category.id for category in self.categories)}
        wrong = sorted(cluster for cluster, found in self.clusters.items() if found.category not in known)
        if wrong or not set(self.clusters) <= set(range(1, self.thing_clusters + self.stuff_clusters + 1)):
            raise ConfigError(f"clusters {wrong[:5] or sorted(self.clusters)[:5]} do not fit its categories or counts")

    def to_table(self) -> Int[np.ndarray, "N"]:
        """Return the category index of each cluster, UNMATCHED for none; entry 0 is unused."""
        indices = {category.id: index for index, category in enumerate(self.categories)}
        table = np.full(self.thing_clusters + self.stuff_clusters + 1, UNMATCHED, np.int64)
        for cluster, assignment in self.clusters.items():
            if assignment.category is not None:
                table[cluster] = indices[assignment.category]
        return table

    def count_matched(self) -> int:
        """Return how many clusters have a category."""
        return sum(assignment.category is not None for assignment in self.clusters.values())

    def write(self, path: Path) -> None:
        """Write the mapping as JSON."""
        with atomic_write(path) as sibling:
            sibling.write_text(to_versioned_json(self, FORMAT_VERSION), encoding="utf-8")


def fingerprint_photos(dataset: str, digests: Sequence[str]) -> FittedOn:
    """Describe images by their sha256; their order does not matter."""
    joined = sha256("\n".join(sorted(digests)).encode()).hexdigest()
    short = tuple(sorted(digest[:_DIGEST_DIGITS] for digest in digests))
    return FittedOn(dataset=dataset, images=len(short), sha256=joined, image_digests=short)


def list_categories(taxonomy: Taxonomy) -> tuple[Category, ...]:
    """Return the categories of a taxonomy with ids from 1."""
    return tuple(Category(id=number, name=name) for number, name in enumerate(taxonomy.names, start=1))


def make_cluster_mapping(
    counts: Int[np.ndarray, "N C"],
    matched: Int[np.ndarray, "N"],
    *,
    source: str,
    matching: MatchingConfig,
    fitted_on: FittedOn,
    spaces: LabelSpaces,
    taxonomy: Taxonomy,
) -> ClusterMapping:
    """Make a mapping from co-occurrence counts and the category indices that were matched from them."""

    def assign(cluster: int) -> ClusterAssignment:
        index, support = int(matched[cluster]), int(counts[cluster].sum())
        if index == UNMATCHED:
            return ClusterAssignment(category=None, purity=0.0, support=support)
        purity = round(float(counts[cluster, index] / max(1, support)), 4)
        return ClusterAssignment(category=index + 1, purity=purity, support=support)

    return ClusterMapping(
        source=source,
        method=matching.method,
        matching=matching,
        fitted_on=fitted_on,
        thing_clusters=spaces.thing_clusters,
        stuff_clusters=spaces.stuff_clusters,
        num_things=spaces.num_things,
        categories=list_categories(taxonomy),
        clusters={cluster: assign(cluster) for cluster in range(1, len(counts))},
    )


def read_mapping(path: Path) -> ClusterMapping:
    """Raises ConfigError if the file is not a mapping of this version."""
    try:
        return parse_versioned_json(ClusterMapping, path.read_bytes(), FORMAT_VERSION, ": run `useg match` again")
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path} is not a mapping file: {error}") from error
