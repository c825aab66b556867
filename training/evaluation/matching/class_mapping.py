"""Decides which category each cluster counts as, from images other than those that are evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Int

from model.category_examples import CategoryExamples, make_examples
from model.errors import ConfigError, DatasetError
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult
from training.evaluation.matching.auxiliary_set import AuxiliaryCounts
from training.evaluation.matching.cluster_matching import (
    UNMATCHED,
    CooccurrenceCounts,
    LabelSpaces,
    MatchingConfig,
    MatchingMethod,
    count_cooccurrences,
    match_clusters,
)
from training.evaluation.matching.mapping_file import (
    ClusterMapping,
    MappingMethod,
    fingerprint_photos,
    list_categories,
    make_cluster_mapping,
)

_FOLDS = 2


@dataclass(frozen=True, kw_only=True)
class ClassMappingConfig:
    """How clusters get their categories, and from which images."""

    matching: MatchingConfig = field(default_factory=MatchingConfig)
    mapping: ClusterMapping | None = None
    """A mapping that was fitted before; None: cross-fit, each half of the images with the mapping of the other half."""
    auxiliary: AuxiliaryCounts | None = None
    """Counts of images that are not evaluated, added to those of the dataset."""
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
        return _apply_mapping(results, dataset, spaces, config.mapping, allow_overlap=config.allow_overlap)
    method = config.matching.method
    if config.allow_overlap:
        counts = _count(results, spaces, config)
        return CrossFittedMapping(
            mappings=(
                replace(
                    fit_class_mapping(counts, spaces, dataset.kind, method),
                    examples=fit_examples(results, dataset, config),
                ),
            ),
            folds=(0,) * len(results),
            method=method,
            fitted_on="the evaluated images: every metric by category is an upper bound" + _describe_auxiliary(config),
            evaluated_on_fit_set=True,
        )
    if len(results) < _FOLDS:
        raise DatasetError(f"cross-fitting needs at least {_FOLDS} images, the dataset has {len(results)}")
    _check_auxiliary(results, config)
    mappings = []
    for fold in range(_FOLDS):
        others = results[1 - fold :: _FOLDS]
        fitted = fit_class_mapping(_count(others, spaces, config), spaces, dataset.kind, method)
        mappings.append(replace(fitted, examples=fit_examples(others, dataset, config)))
    return CrossFittedMapping(
        mappings=tuple(mappings),
        folds=tuple(position % _FOLDS for position in range(len(results))),
        method=method,
        fitted_on="the even images for the odd ones and vice versa" + _describe_auxiliary(config),
        evaluated_on_fit_set=False,
    )


def fit_class_mapping(
    counts: CooccurrenceCounts, spaces: LabelSpaces, kind: AnnotationKind, method: MatchingMethod
) -> ClassMapping:
    """Match each map by its own pixels, or both by votes if the method says so or only objects are labeled."""
    if method == "votes" or kind in ("masks", "boxes"):
        matched = match_clusters(counts.votes, spaces, method)
        return ClassMapping(panoptic=matched, semantic=matched, thing_clusters=spaces.thing_clusters)
    semantic = match_clusters(counts.semantic, spaces, method)
    panoptic = match_clusters(counts.panoptic, spaces, method) if kind == "panoptic" else semantic
    return ClassMapping(panoptic=panoptic, semantic=semantic, thing_clusters=spaces.thing_clusters)


def fit_examples(
    results: Sequence[ImageResult], dataset: GroundTruthDataset, config: ClassMappingConfig
) -> CategoryExamples | None:
    """Return the labeled segments of these images and of the auxiliary ones as examples, for the method "neighbors".

    None for another method, or if the network has no embeddings.
    """
    if config.matching.method != "neighbors":
        return None
    embedded = [
        (each.labeled_categories, each.labeled_embeddings) for each in results if each.labeled_embeddings is not None
    ]
    if config.auxiliary is not None:
        embedded += config.auxiliary.examples
    embedded = [(categories, vectors) for categories, vectors in embedded if vectors.any()]
    if not embedded:
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
    config: ClassMappingConfig,
    source: str,
) -> ClusterMapping:
    """Fit a mapping on all of these images, to be applied to others."""
    _check_auxiliary(results, config)
    counts = _count(results, spaces, config)
    digests = [result.digest for result in results]
    name = dataset.name
    if config.auxiliary is not None:
        digests += config.auxiliary.digests
        name = f"{name}; {config.auxiliary.dataset}"
    is_voted = config.matching.method == "votes" or dataset.kind in ("masks", "boxes")
    chosen = counts.votes if is_voted else counts.panoptic if dataset.kind == "panoptic" else counts.semantic
    mapping = make_cluster_mapping(
        chosen,
        match_clusters(chosen, spaces, config.matching.method),
        source=source,
        matching=config.matching,
        fitted_on=fingerprint_photos(name, digests),
        spaces=spaces,
        taxonomy=dataset.taxonomy,
    )
    return replace(mapping, examples=fit_examples(results, dataset, config))


def check_mapping(
    mapping: ClusterMapping, spaces: LabelSpaces, taxonomy: Taxonomy, digests: Sequence[str], *, allow_overlap: bool
) -> int:
    """Return on how many of the images with these hashes the mapping was fitted.

    Raises ConfigError if that is not 0 and not allowed, or if the mapping is for other clusters or categories.
    """
    _check_spaces(mapping, spaces, taxonomy)
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


def _count(results: Sequence[ImageResult], spaces: LabelSpaces, config: ClassMappingConfig) -> CooccurrenceCounts:
    """Count the co-occurrences in these images and in the auxiliary images."""
    counts = count_cooccurrences(results, spaces, config.matching)
    return counts + config.auxiliary.counts if config.auxiliary else counts


def _describe_auxiliary(config: ClassMappingConfig) -> str:
    auxiliary = config.auxiliary
    return f", with {len(auxiliary.digests)} images of {auxiliary.dataset}" if auxiliary else ""


def _check_auxiliary(results: Sequence[ImageResult], config: ClassMappingConfig) -> None:
    """Raise ConfigError if an auxiliary image is one of these images."""
    auxiliary = set(config.auxiliary.digests) if config.auxiliary else set()
    if shared := len({result.digest for result in results} & auxiliary):
        raise ConfigError(f"{shared} auxiliary images are images of the dataset itself: remove them")


def _apply_mapping(
    results: Sequence[ImageResult],
    dataset: GroundTruthDataset,
    spaces: LabelSpaces,
    mapping: ClusterMapping,
    *,
    allow_overlap: bool,
) -> CrossFittedMapping:
    digests = [result.digest for result in results]
    overlap = check_mapping(mapping, spaces, dataset.taxonomy, digests, allow_overlap=allow_overlap)
    table = mapping.to_table()
    fitted_on = mapping.fitted_on
    origin = f"{fitted_on.images} images of {fitted_on.dataset}, sha256 {fitted_on.sha256}"
    return CrossFittedMapping(
        mappings=(
            ClassMapping(
                panoptic=table, semantic=table, thing_clusters=spaces.thing_clusters, examples=mapping.examples
            ),
        ),
        folds=(0,) * len(results),
        method=mapping.method,
        fitted_on=origin + (f"; {overlap} of the evaluated images are among them" if overlap else ""),
        evaluated_on_fit_set=overlap > 0,
    )


def _check_spaces(mapping: ClusterMapping, spaces: LabelSpaces, taxonomy: Taxonomy) -> None:
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
