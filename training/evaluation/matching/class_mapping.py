"""Which category each cluster is scored as, and that it was decided on other pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from model.errors import ConfigError, LabelStoreError
from training.choices import MappingMethod, MatchingMethod
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import CooccurrenceCounts, ImageResult, count_cooccurrences
from training.evaluation.matching.auxiliary_set import AuxiliaryCounts
from training.evaluation.matching.cluster_matching import UNMATCHED, LabelSpaces, VoteThresholds, match
from training.evaluation.matching.mapping_file import ClusterMapping, fingerprint_photos, make_cluster_mapping

_FOLDS = 2


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How clusters get their categories."""

    method: MatchingMethod = "majority"
    thresholds: VoteThresholds = field(default_factory=VoteThresholds)
    """Of the paper's votes."""
    names: ClusterMapping | None = None
    """Fitted before; None: fit on the set itself, each half on the other."""
    witnesses: AuxiliaryCounts | None = None
    """Pictures that are not scored and help to name; they count with those of the set."""
    is_same_set: bool = False
    """Allow what was fitted to be scored: with names, that they saw these photos; without, one fit on everything."""


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """Cluster to category."""

    panoptic: Int[np.ndarray, "N"]
    """For the panoptic map and for objects."""
    semantic: Int[np.ndarray, "N"]


@dataclass(frozen=True, kw_only=True)
class CrossFittedMapping:
    """Namings, and what they rest on."""

    namings: tuple[ClassMapping, ...]
    """One, or one a fold."""
    folds: tuple[int, ...]
    """The naming of each picture."""
    method: MappingMethod
    fitted_on: str
    """In words."""
    evaluated_on_fit_set: bool
    """True makes every figure with categories in it an upper bound."""

    def of(self, picture: int) -> ClassMapping:
        return self.namings[self.folds[picture]]


def map_clusters(
    comparisons: Sequence[ImageResult], truth: GroundTruthDataset, spaces: LabelSpaces, plan: MatchingConfig
) -> CrossFittedMapping:
    """A naming for every picture.

    Raises ConfigError if the names are for other clusters or categories, or have seen one of the pictures and
    `is_same_set` does not allow that; LabelStoreError if there are too few pictures for two folds.
    """
    if plan.names is not None:
        return _take_names(comparisons, truth, spaces, plan.names, is_same_set=plan.is_same_set)
    if plan.is_same_set:
        tables = _count(comparisons, spaces, plan)
        return CrossFittedMapping(
            namings=(fit_class_mapping(tables, spaces, truth.kind, plan.method),),
            folds=(0,) * len(comparisons),
            method=plan.method,
            fitted_on="the scored set itself: every figure with categories in it is an upper bound" + _credit(plan),
            evaluated_on_fit_set=True,
        )
    if len(comparisons) < _FOLDS:
        raise LabelStoreError(
            f"the set holds {len(comparisons)} pictures: clusters are matched on others than are scored"
        )
    _check_witnesses(comparisons, plan)
    halves = [_count(comparisons[1 - fold :: _FOLDS], spaces, plan) for fold in range(_FOLDS)]
    return CrossFittedMapping(
        namings=tuple(fit_class_mapping(tables, spaces, truth.kind, plan.method) for tables in halves),
        folds=tuple(place % _FOLDS for place in range(len(comparisons))),
        method=plan.method,
        fitted_on="the even pictures for the odd ones and the other way round" + _credit(plan),
        evaluated_on_fit_set=False,
    )


def fit_class_mapping(
    tables: CooccurrenceCounts, spaces: LabelSpaces, kind: AnnotationKind, method: MatchingMethod
) -> ClassMapping:
    """Each map by the pixels of its own, or everything by votes where the method or the truth has nothing else."""
    if method == "votes" or kind in ("masks", "boxes"):
        voted = match(tables.votes, spaces, method)
        return ClassMapping(panoptic=voted, semantic=voted)
    semantic = match(tables.semantic, spaces, method)
    return ClassMapping(
        panoptic=match(tables.panoptic, spaces, method) if kind == "panoptic" else semantic, semantic=semantic
    )


def fit_cluster_mapping(
    comparisons: Sequence[ImageResult],
    truth: GroundTruthDataset,
    spaces: LabelSpaces,
    plan: MatchingConfig,
    source: str,
) -> ClusterMapping:
    """Names fitted on all of these pictures, to be applied to others."""
    _check_witnesses(comparisons, plan)
    tables = _count(comparisons, spaces, plan)
    digests = [each.digest for each in comparisons]
    title = truth.name
    if plan.witnesses is not None:
        digests += plan.witnesses.digests
        title = f"{title}; {plan.witnesses.truth}"
    is_voted = plan.method == "votes" or truth.kind in ("masks", "boxes")
    table = tables.votes if is_voted else tables.panoptic if truth.kind == "panoptic" else tables.semantic
    return make_cluster_mapping(
        table,
        match(table, spaces, plan.method),
        source=source,
        method=plan.method,
        thresholds=plan.thresholds if is_voted else None,
        fitted_on=fingerprint_photos(title, digests),
        spaces=spaces,
        taxonomy=truth.taxonomy,
    )


def _count(comparisons: Sequence[ImageResult], spaces: LabelSpaces, plan: MatchingConfig) -> CooccurrenceCounts:
    """All meetings in these pictures, and in those of the witnesses."""
    tables = count_cooccurrences(comparisons, spaces, plan.thresholds)
    return tables + plan.witnesses.tables if plan.witnesses else tables


def _credit(plan: MatchingConfig) -> str:
    return f", with {len(plan.witnesses.digests)} pictures of {plan.witnesses.truth}" if plan.witnesses else ""


def _check_witnesses(comparisons: Sequence[ImageResult], plan: MatchingConfig) -> None:
    """Raise ConfigError if one of them is among these pictures."""
    shared = len({each.digest for each in comparisons} & set(plan.witnesses.digests)) if plan.witnesses else 0
    if shared:
        raise ConfigError(f"{shared} of the pictures that help to name are pictures of the set itself: leave them out")


def _take_names(
    comparisons: Sequence[ImageResult],
    truth: GroundTruthDataset,
    spaces: LabelSpaces,
    names: ClusterMapping,
    *,
    is_same_set: bool,
) -> CrossFittedMapping:
    shared = check_mapping(
        names, spaces, truth.taxonomy, [each.digest for each in comparisons], is_same_set=is_same_set
    )
    table = names.make_table()
    origin = f"{names.fitted_on.images} pictures of {names.fitted_on.truth}, sha256 {names.fitted_on.sha256}"
    return CrossFittedMapping(
        namings=(ClassMapping(panoptic=table, semantic=table),),
        folds=(0,) * len(comparisons),
        method=names.method,
        fitted_on=origin + (f"; {shared} of the scored pictures are among them" if shared else ""),
        evaluated_on_fit_set=shared > 0,
    )


def check_mapping(
    names: ClusterMapping, spaces: LabelSpaces, taxonomy: Taxonomy, digests: Sequence[str], *, is_same_set: bool
) -> int:
    """How many of the photos with these hashes the names have seen.

    Raises ConfigError if that is any and not allowed, or if the names are for other clusters or categories.
    """
    _check_spaces(names, spaces, taxonomy)
    shared = names.fitted_on.count_overlap(digests)
    if shared and not is_same_set:
        raise ConfigError(
            f"the names were fitted on {shared} of the {len(digests)} photos that they are to be scored on: fit them "
            "on another set, or give --same-set and say so"
        )
    return shared


def _check_spaces(names: ClusterMapping, spaces: LabelSpaces, taxonomy: Taxonomy) -> None:
    given = names.thing_clusters, names.stuff_clusters
    if given != (spaces.thing_clusters, spaces.stuff_clusters):
        raise ConfigError(
            f"the names are for {given[0]} thing and {given[1]} stuff clusters, there are {spaces.thing_clusters} and "
            f"{spaces.stuff_clusters}: run `useg-train match` for this source"
        )
    listed = tuple(category.name for category in names.categories)
    if (listed, names.things) != (taxonomy.names, taxonomy.things):
        strangers = sorted(set(listed) ^ set(taxonomy.names))
        raise ConfigError(
            f"the names are for {len(listed)} categories, the set has {len(taxonomy.names)}"
            f" ({', '.join(strangers[:3]) or 'in another order'}): fit them with the same layout and protocol"
        )


def list_unmatched(comparisons: Sequence[ImageResult], fit: CrossFittedMapping) -> set[int]:
    """Clusters that were predicted in a picture and have no category there."""
    unmatched: set[int] = set()
    for place, each in enumerate(comparisons):
        naming = fit.of(place)
        used = set() if each.panoptic is None else set(each.panoptic.predicted.tolist())
        if each.panoptic is None and each.semantic is not None:
            used |= set(each.semantic.predicted.tolist())
        if each.semantic is None:
            used |= {found.cluster for found in each.detections}
        unmatched |= {cluster for cluster in used if naming.panoptic[cluster] == UNMATCHED}
    return unmatched
