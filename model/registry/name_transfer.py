"""Names of an artifact's clusters proposed for those of another, by how both cut up the same photos."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from jaxtyping import Float, Int

from model.contract import Contract
from model.errors import ConfigError
from model.postprocessing.panoptic import Segmentation
from model.registry.category_names import CategoryName, CategoryNames, empty_names


@dataclass(frozen=True, kw_only=True)
class TransferThresholds:
    """When a name is carried over; shares lie in 0..1."""

    share: float = 0.5
    """Least part of the new cluster that lies under the name."""
    margin: float = 0.2
    """Least lead of that part over what lies under the next name."""
    pictures: int = 3
    """Least pictures that show the new cluster."""

    def __post_init__(self) -> None:
        for name in ("share", "margin"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ClusterOverlap:
    """Where clusters of two networks met; row and column 0 are void."""

    shares: Float[np.ndarray, "O+1 N+1"]
    """What an old and a new cluster have in common, as a part of a picture, summed over the pictures."""
    pictures: Int[np.ndarray, "N+1"]
    """How many of them show each new cluster."""


@dataclass(frozen=True, kw_only=True)
class NameProposal:
    """What may become of one new cluster's name."""

    cluster: int
    category: str | None
    """The name to carry over; None: none is clear."""
    best: str | None
    """The name that most of it lies under, clear or not."""
    share: float
    """That part of it, in 0..1."""
    runner_up: str | None
    """What comes next; None: nothing with a name."""
    runner_up_share: float
    pictures: int
    """That show it."""
    reason: str


def count_overlap(pairs: Iterable[tuple[Segmentation, Segmentation]], old: Contract, new: Contract) -> ClusterOverlap:
    """Where clusters met in panoptic answers of an old and a new artifact, a pair a picture, both in its own size.

    Each picture counts alike, whatever its size.
    """
    rows, columns = (each.thing_clusters + each.stuff_clusters + 1 for each in (old, new))
    shares, pictures = np.zeros((rows, columns)), np.zeros(columns, np.int64)
    for first, second in pairs:
        before, after = _cluster_map(first), _cluster_map(second)
        met = np.bincount((before * columns + after).ravel(), minlength=rows * columns).reshape(rows, columns)
        shares += met / before.size
        pictures += met.any(0)
    return ClusterOverlap(shares=shares, pictures=pictures)


def propose_names(
    agreement: ClusterOverlap, old: Contract, new: Contract, rule: TransferThresholds
) -> list[NameProposal]:
    """A proposal for each new cluster that was seen; `old` has the names to carry.

    Names of things go to things and those of stuff to stuff. Old clusters of one name count together.
    """
    seen = np.flatnonzero(agreement.pictures[1:]) + 1
    return [_propose_name(int(cluster), agreement, old, new, rule) for cluster in seen]


def transfer_names(proposals: Iterable[NameProposal], old: Contract, new: Contract) -> CategoryNames:
    """The clear proposals as names for the new artifact."""
    at, by = datetime.now(UTC).isoformat(timespec="seconds"), f"carried over from {old.name} {old.version}"
    names = {each.cluster: CategoryName(category=each.category, by=by, at=at) for each in proposals if each.category}
    return empty_names(new).replace_all(names, by)


def keep_user_names(contract: Contract, glossary: CategoryNames) -> Contract:
    """The contract with nothing but the names that people gave."""
    named = glossary.apply(contract)
    return replace(named, categories={cluster: named.categories[cluster] for cluster in glossary.names})


def _propose_name(
    cluster: int, agreement: ClusterOverlap, old: Contract, new: Contract, rule: TransferThresholds
) -> NameProposal:
    is_thing = new.is_thing(cluster)
    column = agreement.shares[:, cluster] / agreement.shares[:, cluster].sum()
    parts: dict[str, float] = {}
    for each in range(1, len(column)):
        if old.is_thing(each) == is_thing and each in old.categories:
            parts[old.categories[each].name] = parts.get(old.categories[each].name, 0.0) + float(column[each])
    ranked = sorted(((part, name) for name, part in parts.items() if part > 0.0), reverse=True)
    (share, best), (second, runner_up) = [*((part, str(name)) for part, name in ranked), *[(0.0, None)] * 2][:2]
    pictures = int(agreement.pictures[cluster])
    reason = _rejection_reason(best, share, share - second, pictures, rule)
    return NameProposal(
        cluster=cluster,
        category=None if reason else best,
        best=best,
        share=round(share, 4),
        runner_up=runner_up,
        runner_up_share=round(second, 4),
        pictures=pictures,
        reason=reason or "clear",
    )


def _rejection_reason(best: str | None, share: float, lead: float, pictures: int, rule: TransferThresholds) -> str:
    """Why a name is not carried over; empty if it is."""
    if best is None:
        return "lies under no name"
    if pictures < rule.pictures:
        return f"seen in {pictures} pictures, {rule.pictures} are needed"
    if share < rule.share:
        return f"{share:.0%} of it lies under this name, {rule.share:.0%} are needed"
    if lead < rule.margin:
        return f"leads by {lead:.0%}, {rule.margin:.0%} are needed"
    return ""


def _cluster_map(answer: Segmentation) -> Int[np.ndarray, "H W"]:
    """The cluster of each pixel, 0 for void."""
    table = np.zeros(max((segment.id for segment in answer.segments), default=0) + 1, np.int64)
    for segment in answer.segments:
        table[segment.id] = segment.cluster
    clusters: Int[np.ndarray, "H W"] = table[answer.label_map]
    return clusters
