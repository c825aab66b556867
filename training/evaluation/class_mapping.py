"""Decides which category each cluster counts as, and stores it: the mapping file that `useg match` writes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

from model.embeddings import Category, CategoryExamples, make_examples
from model.errors import ConfigError, DatasetError
from model.files import hash_file, replace_file
from model.validation import parse_versioned_json, to_versioned_json
from training.evaluation.cluster_matching import (
    UNMATCHED,
    MatchingConfig,
    MatchingMethod,
    count_cooccurrences,
    match_clusters,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult, evaluate_all
from training.evaluation.predictors import Predictor

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

    def to_class_mapping(self) -> "ClassMapping":
        """Return the category index of each cluster, UNMATCHED for none, for every map; entry 0 is unused."""
        indices = {category.id: index for index, category in enumerate(self.categories)}
        table = np.full(self.thing_clusters + self.stuff_clusters + 1, UNMATCHED, np.int64)
        for cluster, assignment in self.clusters.items():
            if assignment.category is not None:
                table[cluster] = indices[assignment.category]
        return ClassMapping(panoptic=table, semantic=table, thing_clusters=self.thing_clusters, examples=self.examples)

    def write(self, path: Path) -> None:
        """Write the mapping as JSON."""
        replace_file(path, to_versioned_json(self, FORMAT_VERSION))


@dataclass(frozen=True, kw_only=True)
class ClassMappingConfig:
    """How clusters get their categories, and from which images."""

    matching: MatchingConfig = field(default_factory=MatchingConfig)
    mapping: ClusterMapping | None = None
    """A mapping that was fitted before; None: cross-fit, each half of the images with the mapping of the other half."""
    auxiliary: GroundTruthDataset | None = None
    """Images that are not evaluated, in the same categories, added to those that a mapping is fitted on."""
    allow_overlap: bool = False
    """Allow evaluation on images that `mapping` was fitted on; without `mapping`, fit one mapping on all images."""


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """Category index of each cluster."""

    panoptic: Int[np.ndarray, "N"]
    """For panoptic maps and objects."""
    semantic: Int[np.ndarray, "N"]
    thing_clusters: int
    examples: CategoryExamples | None
    """By which segments with an embedding get their category instead of that of their cluster."""

    def categorize(
        self, table: Int[np.ndarray, "N"], clusters: Int[np.ndarray, "P"], embeddings: Float32[np.ndarray, "P E"] | None
    ) -> Int[np.ndarray, "P"]:
        """Return the category index of each segment, UNMATCHED for none; `table` is that of its map."""
        found: Int[np.ndarray, "P"] = table[clusters]
        if self.examples is None or embeddings is None:
            return found
        labels = self.examples.classify(embeddings, clusters <= self.thing_clusters)
        return np.where(labels >= 0, labels, found)


@dataclass(frozen=True, kw_only=True)
class MatchingSummary:
    """How clusters got their categories."""

    method: MappingMethod
    fitted_on: str
    evaluated_on_fit_set: bool
    """If true, every metric by category is an upper bound."""
    clusters: int
    unmatched_clusters: int
    """Clusters that were predicted and have no category."""


def map_clusters(
    results: Sequence[ImageResult], predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> tuple[list[ClassMapping], MatchingSummary]:
    """Return the mapping of each image. Raises DatasetError if there are too few images to cross-fit."""
    method: MappingMethod = config.matching.method
    is_fit_set = config.allow_overlap
    if config.mapping is not None:
        method, origin = config.mapping.method, config.mapping.fitted_on
        mappings = [config.mapping.to_class_mapping()] * len(results)
        fitted_on = f"{origin.images} images of {origin.dataset}, sha256 {origin.sha256}"
        overlap = origin.count_overlap(result.digest for result in results)
        fitted_on += f"; {overlap} of the evaluated images are among them" if overlap else ""
        is_fit_set = overlap > 0
    else:
        auxiliary = evaluate_all(predictor, config.auxiliary) if config.auxiliary else []
        fit = partial(fit_class_mapping, predictor=predictor, dataset=dataset, config=config.matching)
        if config.allow_overlap:
            mappings = [fit([*results, *auxiliary])] * len(results)
            fitted_on = "the evaluated images: every metric by category is an upper bound"
        elif len(results) < 2:
            raise DatasetError(f"cross-fitting needs at least 2 images, the dataset has {len(results)}")
        else:
            for_even, for_odd = (fit([*results[first::2], *auxiliary]) for first in (1, 0))
            mappings = [for_odd if position % 2 else for_even for position in range(len(results))]
            fitted_on = "the even images for the odd ones and vice versa"
        if config.auxiliary:
            fitted_on += f", with {len(auxiliary)} images of {config.auxiliary.name}"
    return mappings, MatchingSummary(
        method=method,
        fitted_on=fitted_on,
        evaluated_on_fit_set=is_fit_set,
        clusters=predictor.thing_clusters + predictor.stuff_clusters,
        unmatched_clusters=count_unmatched(results, mappings),
    )


def fit_class_mapping(
    results: Sequence[ImageResult], predictor: Predictor, dataset: GroundTruthDataset, config: MatchingConfig
) -> ClassMapping:
    """Match the clusters of each map."""
    panoptic, semantic = (
        match_clusters(counts, predictor.thing_clusters, dataset.taxonomy.num_things, config.method)
        for counts in count_cooccurrences(results, predictor, dataset, config)
    )
    return ClassMapping(
        panoptic=panoptic,
        semantic=semantic,
        thing_clusters=predictor.thing_clusters,
        examples=fit_examples(results, dataset, config),
    )


def fit_examples(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, config: MatchingConfig
) -> CategoryExamples | None:
    """Return the labeled segments of these images as examples, for the method "neighbors".

    None for another method, or if the network has no embeddings.
    """
    vectors = [each.labeled_embeddings for each in results if each.labeled_embeddings is not None]
    if config.method != "neighbors" or not any(each.any() for each in vectors):
        return None
    labels = np.array([category for each in results for category in each.labeled_categories], np.int64)
    taxonomy = dataset.taxonomy
    return make_examples(list_categories(taxonomy), taxonomy.num_things, labels, np.concatenate(vectors))


def fit_mapping(predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig) -> ClusterMapping:
    """Fit a mapping on the whole dataset and the auxiliary images, to be applied to other images."""
    results, name = evaluate_all(predictor, dataset), dataset.name
    if config.auxiliary:
        results += evaluate_all(predictor, config.auxiliary)
        name += f"; {config.auxiliary.name}"
    matching, num_things = config.matching, dataset.taxonomy.num_things
    counts, _ = count_cooccurrences(results, predictor, dataset, matching)
    matched = match_clusters(counts, predictor.thing_clusters, num_things, matching.method)

    def assign(cluster: int) -> ClusterAssignment:
        index, support = int(matched[cluster]), int(counts[cluster].sum())
        if index == UNMATCHED:
            return ClusterAssignment(category=None, purity=0.0, support=support)
        purity = round(float(counts[cluster, index] / max(1, support)), 4)
        return ClusterAssignment(category=index + 1, purity=purity, support=support)

    return ClusterMapping(
        source=predictor.digest,
        method=matching.method,
        matching=matching,
        fitted_on=fingerprint_photos(name, [result.digest for result in results]),
        thing_clusters=predictor.thing_clusters,
        stuff_clusters=predictor.stuff_clusters,
        num_things=num_things,
        categories=list_categories(dataset.taxonomy),
        clusters={cluster: assign(cluster) for cluster in range(1, len(counts))},
        examples=fit_examples(results, dataset, matching),
    )


def check_mapping(predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig) -> None:
    """Raise ConfigError if the given mapping is for other clusters or categories, or was fitted on these images.

    To be called before the long pass over the images.
    """
    mapping, taxonomy = config.mapping, dataset.taxonomy
    if mapping is None:
        return
    given = mapping.thing_clusters, mapping.stuff_clusters
    if given != (predictor.thing_clusters, predictor.stuff_clusters):
        raise ConfigError(
            f"the mapping is for {given[0]} thing and {given[1]} stuff clusters, expected {predictor.thing_clusters} "
            f"and {predictor.stuff_clusters}: run `useg match` for this predictor"
        )
    names = tuple(category.name for category in mapping.categories)
    if (names, mapping.num_things) != (taxonomy.names, taxonomy.num_things):
        differing = sorted(set(names) ^ set(taxonomy.names))
        raise ConfigError(
            f"the mapping is for {len(names)} categories, the dataset has {len(taxonomy.names)} "
            f"({', '.join(differing[:3]) or 'in another order'}): fit it with the same --format and --classes"
        )
    overlap = mapping.fitted_on.count_overlap(hash_file(image.path) for image in dataset.images)
    if overlap and not config.allow_overlap:
        raise ConfigError(
            f"the mapping was fitted on {overlap} of the {len(dataset.images)} images to evaluate: fit it on another "
            "dataset, or give --allow-train-test-overlap and say so with the results"
        )


def count_unmatched(results: Sequence[ImageResult], mappings: Sequence[ClassMapping]) -> int:
    """Return how many clusters were predicted in an image and have no category there."""
    unmatched: set[int] = set()
    for result, mapping in zip(results, mappings, strict=True):
        overlap = result.panoptic or result.semantic
        predicted = overlap.predicted.tolist() if overlap else [each.cluster for each in result.detections]
        unmatched |= {cluster for cluster in predicted if mapping.panoptic[cluster] == UNMATCHED}
    return len(unmatched)


def fingerprint_photos(dataset: str, digests: Sequence[str]) -> FittedOn:
    """Describe images by their sha256; their order does not matter."""
    joined = sha256("\n".join(sorted(digests)).encode()).hexdigest()
    short = tuple(sorted(digest[:_DIGEST_DIGITS] for digest in digests))
    return FittedOn(dataset=dataset, images=len(short), sha256=joined, image_digests=short)


def list_categories(taxonomy: Taxonomy) -> tuple[Category, ...]:
    """Return the categories of a taxonomy with ids from 1."""
    return tuple(Category(id=number, name=name) for number, name in enumerate(taxonomy.names, start=1))


def read_mapping(path: Path) -> ClusterMapping:
    """Raises ConfigError if the file is not a mapping of this version."""
    try:
        return parse_versioned_json(ClusterMapping, path.read_bytes(), FORMAT_VERSION, ": run `useg match` again")
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path} is not a mapping file: {error}") from error
