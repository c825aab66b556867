"""Decides which category each cluster counts as, and stores it: the mapping file that `useg match` writes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

from model.embeddings import Category, CategoryExamples, make_examples
from model.errors import ConfigError, DatasetError
from model.files import atomic_write
from model.validation import parse_versioned_json, to_versioned_json
from training.evaluation.auxiliary_images import AuxiliaryResults
from training.evaluation.cluster_matching import (
    UNMATCHED,
    LabelSpaces,
    MatchingConfig,
    MatchingMethod,
    count_cooccurrences,
    match_clusters,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult

FORMAT_VERSION = 3
_DIGEST_DIGITS = 16
"""Digits of an image's sha256 that are stored: enough to recognize it."""
MappingMethod = Literal[MatchingMethod, "given"]
"""How a mapping was made: by matching, or because clusters are categories."""
_FOLDS = 2


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

    def write(self, path: Path) -> None:
        """Write the mapping as JSON."""
        with atomic_write(path) as sibling:
            sibling.write_text(to_versioned_json(self, FORMAT_VERSION), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ClassMappingConfig:
    """How clusters get their categories, and from which images."""

    matching: MatchingConfig = field(default_factory=MatchingConfig)
    mapping: ClusterMapping | None = None
    """A mapping that was fitted before; None: cross-fit, each half of the images with the mapping of the other half."""
    auxiliary: AuxiliaryResults | None = None
    """Images that are not evaluated, added to those that a mapping is fitted on."""
    allow_overlap: bool = False
    """Allow evaluation on images that `mapping` was fitted on; without `mapping`, fit one mapping on all images."""


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """Category index of each cluster."""

    panoptic: Int[np.ndarray, "N"]
    """For panoptic maps and objects."""
    semantic: Int[np.ndarray, "N"]
    thing_clusters: int
    examples: CategoryExamples | None = None
    """By which segments with an embedding get their category instead of that of their cluster."""

    def categorize(
        self, clusters: Int[np.ndarray, "P"], embeddings: Float32[np.ndarray, "P E"] | None, table: Int[np.ndarray, "N"]
    ) -> Int[np.ndarray, "P"]:
        """Return the category index of each segment, UNMATCHED for none; `table` has those of clusters."""
        found: Int[np.ndarray, "P"] = table[clusters]
        if self.examples is None or embeddings is None:
            return found
        labels = self.examples.classify(embeddings, clusters <= self.thing_clusters)
        return np.where(labels >= 0, labels, found)

    def categorize_panoptic(self, result: ImageResult) -> Int[np.ndarray, "P"]:
        """Return the category index of each segment of the panoptic map."""
        assert result.panoptic is not None, "the dataset has no segments"
        return self.categorize(result.panoptic.predicted, result.panoptic_embeddings, self.panoptic)

    def categorize_semantic(self, result: ImageResult) -> Int[np.ndarray, "P"]:
        """Return the category index of each segment of the semantic map."""
        assert result.semantic is not None, "the dataset has no semantic labels"
        return self.categorize(result.semantic.predicted, result.semantic_embeddings, self.semantic)

    def categorize_detections(self, result: ImageResult) -> Int[np.ndarray, "P"]:
        """Return the category index of each detection."""
        embeddings = [each.embedding for each in result.detections if each.embedding is not None]
        clusters = np.array([each.cluster for each in result.detections], np.int64)
        return self.categorize(clusters, np.stack(embeddings) if embeddings else None, self.panoptic)


@dataclass(frozen=True, kw_only=True)
class CrossFittedMapping:
    """The mapping of each image, and what it was fitted on."""

    mappings: tuple[ClassMapping, ...]
    """One, or one per fold."""
    folds: tuple[int, ...]
    """For each image, the position of its mapping in `mappings`."""
    method: MappingMethod
    fitted_on: str
    """Description for the report."""
    evaluated_on_fit_set: bool
    """If true, every metric by category is an upper bound."""

    def for_image(self, position: int) -> ClassMapping:
        return self.mappings[self.folds[position]]


def map_clusters(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, spaces: LabelSpaces, config: ClassMappingConfig
) -> CrossFittedMapping:
    """Return a mapping for every image.

    Raises ConfigError if the given mapping is for other clusters or categories, or was fitted on one of the images
    and `allow_overlap` is false; DatasetError if there are too few images for two folds.
    """
    if config.mapping is not None:
        return _apply_mapping(results, dataset, spaces, config)
    auxiliary = config.auxiliary.results if config.auxiliary else ()
    added = f", with {len(auxiliary)} images of {config.auxiliary.dataset}" if config.auxiliary else ""
    if config.allow_overlap:
        return CrossFittedMapping(
            mappings=(fit_class_mapping([*results, *auxiliary], dataset, spaces, config.matching),),
            folds=(0,) * len(results),
            method=config.matching.method,
            fitted_on="the evaluated images: every metric by category is an upper bound" + added,
            evaluated_on_fit_set=True,
        )
    if len(results) < _FOLDS:
        raise DatasetError(f"cross-fitting needs at least {_FOLDS} images, the dataset has {len(results)}")
    return CrossFittedMapping(
        mappings=tuple(
            fit_class_mapping([*results[1 - fold :: _FOLDS], *auxiliary], dataset, spaces, config.matching)
            for fold in range(_FOLDS)
        ),
        folds=tuple(position % _FOLDS for position in range(len(results))),
        method=config.matching.method,
        fitted_on="the even images for the odd ones and vice versa" + added,
        evaluated_on_fit_set=False,
    )


def fit_class_mapping(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, spaces: LabelSpaces, config: MatchingConfig
) -> ClassMapping:
    """Match the clusters of each map."""
    panoptic, semantic = (
        match_clusters(counts, spaces, config.method) for counts in _count_for_maps(results, dataset, spaces, config)
    )
    return ClassMapping(
        panoptic=panoptic,
        semantic=semantic,
        thing_clusters=spaces.thing_clusters,
        examples=fit_examples(results, dataset, config),
    )


def _count_for_maps(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, spaces: LabelSpaces, config: MatchingConfig
) -> tuple[Int[np.ndarray, "N C"], Int[np.ndarray, "N C"]]:
    """Return the counts by which the panoptic and the semantic map are matched.

    They are votes if the method says so or only objects are labeled, else the pixels of each map; where no panoptic
    map is labeled, those of the semantic map serve both.
    """
    counts = count_cooccurrences(results, spaces, config)
    if config.method == "votes" or dataset.kind in ("masks", "boxes"):
        return counts.votes, counts.votes
    return counts.panoptic if dataset.kind == "panoptic" else counts.semantic, counts.semantic


def fit_examples(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, config: MatchingConfig
) -> CategoryExamples | None:
    """Return the labeled segments of these images as examples, for the method "neighbors".

    None for another method, or if the network has no embeddings.
    """
    embedded = [
        (each.labeled_categories, each.labeled_embeddings)
        for each in results
        if each.labeled_embeddings is not None and each.labeled_embeddings.any()
    ]
    if config.method != "neighbors" or not embedded:
        return None
    return make_examples(
        list_categories(dataset.taxonomy),
        dataset.taxonomy.num_things,
        np.concatenate([np.array(categories, np.int64) for categories, _ in embedded]),
        np.concatenate([vectors for _, vectors in embedded]),
    )


def fit_cluster_mapping(
    results: Sequence[ImageResult],
    dataset: GroundTruthDataset,
    spaces: LabelSpaces,
    config: MatchingConfig,
    source: str,
) -> ClusterMapping:
    """Fit a mapping on all of these images, to be applied to others."""
    chosen, _ = _count_for_maps(results, dataset, spaces, config)
    matched = match_clusters(chosen, spaces, config.method)

    def assign(cluster: int) -> ClusterAssignment:
        index, support = int(matched[cluster]), int(chosen[cluster].sum())
        if index == UNMATCHED:
            return ClusterAssignment(category=None, purity=0.0, support=support)
        purity = round(float(chosen[cluster, index] / max(1, support)), 4)
        return ClusterAssignment(category=index + 1, purity=purity, support=support)

    return ClusterMapping(
        source=source,
        method=config.method,
        matching=config,
        fitted_on=fingerprint_photos(dataset.name, [result.digest for result in results]),
        thing_clusters=spaces.thing_clusters,
        stuff_clusters=spaces.stuff_clusters,
        num_things=spaces.num_things,
        categories=list_categories(dataset.taxonomy),
        clusters={cluster: assign(cluster) for cluster in range(1, len(chosen))},
        examples=fit_examples(results, dataset, config),
    )


def check_mapping(
    mapping: ClusterMapping, spaces: LabelSpaces, taxonomy: Taxonomy, digests: Sequence[str], *, allow_overlap: bool
) -> int:
    """Return on how many of the images with these hashes the mapping was fitted.

    Raises ConfigError if that is not 0 and not allowed, or if the mapping is for other clusters or categories.
    """
    given = mapping.thing_clusters, mapping.stuff_clusters
    if given != (spaces.thing_clusters, spaces.stuff_clusters):
        raise ConfigError(
            f"the mapping is for {given[0]} thing and {given[1]} stuff clusters, expected {spaces.thing_clusters} and "
            f"{spaces.stuff_clusters}: run `useg match` for this predictor"
        )
    names = tuple(category.name for category in mapping.categories)
    if (names, mapping.num_things) != (taxonomy.names, taxonomy.num_things):
        differing = sorted(set(names) ^ set(taxonomy.names))
        raise ConfigError(
            f"the mapping is for {len(names)} categories, the dataset has {len(taxonomy.names)} "
            f"({', '.join(differing[:3]) or 'in another order'}): fit it with the same --format and --classes"
        )
    overlap = mapping.fitted_on.count_overlap(digests)
    if overlap and not allow_overlap:
        raise ConfigError(
            f"the mapping was fitted on {overlap} of the {len(digests)} images to evaluate: fit it on another dataset, "
            "or give --allow-train-test-overlap and say so with the results"
        )
    return overlap


def list_unmatched(results: Sequence[ImageResult], mapping: CrossFittedMapping) -> set[int]:
    """Return the clusters that were predicted in an image and have no category there."""
    unmatched: set[int] = set()
    for position, result in enumerate(results):
        if result.panoptic is not None:
            predicted = set(result.panoptic.predicted.tolist())
        elif result.semantic is not None:
            predicted = set(result.semantic.predicted.tolist())
        else:
            predicted = {detection.cluster for detection in result.detections}
        table = mapping.for_image(position).panoptic
        unmatched |= {cluster for cluster in predicted if table[cluster] == UNMATCHED}
    return unmatched


def _apply_mapping(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, spaces: LabelSpaces, config: ClassMappingConfig
) -> CrossFittedMapping:
    mapping = config.mapping
    assert mapping is not None, "no mapping was given"
    digests = [result.digest for result in results]
    overlap = check_mapping(mapping, spaces, dataset.taxonomy, digests, allow_overlap=config.allow_overlap)
    table, fitted_on = mapping.to_table(), mapping.fitted_on
    origin = f"{fitted_on.images} images of {fitted_on.dataset}, sha256 {fitted_on.sha256}"
    class_mapping = ClassMapping(
        panoptic=table, semantic=table, thing_clusters=spaces.thing_clusters, examples=mapping.examples
    )
    return CrossFittedMapping(
        mappings=(class_mapping,),
        folds=(0,) * len(results),
        method=mapping.method,
        fitted_on=origin + (f"; {overlap} of the evaluated images are among them" if overlap else ""),
        evaluated_on_fit_set=overlap > 0,
    )


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
