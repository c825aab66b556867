"""Transfer of cluster names between two artifacts, by how both segment the same photos."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from model.contract import Contract
from model.errors import ConfigError
from model.postprocessing.panoptic import Segmentation
from model.registry.category_names import CategoryName, CategoryNames, empty_names, get_timestamp


@dataclass(frozen=True, kw_only=True)
class TransferThresholds:
    """When a name is transferred to a new cluster."""

    min_overlap: float = 0.5
    """Minimum fraction of the new cluster's pixels that had the name, 0 to 1."""
    min_margin: float = 0.2
    """Minimum difference to the fraction of the second most frequent name, 0 to 1."""
    min_images: int = 3
    """Minimum number of images that contain the new cluster."""

    def __post_init__(self) -> None:
        for name in ("min_overlap", "min_margin"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ClusterOverlap:
    """Co-occurrence of the clusters of two networks; row and column 0 are void."""

    fractions: Float[np.ndarray, "O+1 N+1"]
    """Common pixels of an old and a new cluster as a fraction of the image, summed over images."""
    images: Int[np.ndarray, "N+1"]
    """Number of images that contain each new cluster."""


@dataclass(frozen=True, kw_only=True)
class NameProposal:
    """The name that a new cluster may get."""

    cluster: int
    category_name: str | None
    """The name to transfer; None if no name is clear enough."""
    best: str | None
    """The most frequent name among its pixels."""
    overlap: float
    """Fraction of its pixels that had that name, 0..1."""
    runner_up: str | None
    """The second most frequent name."""
    runner_up_overlap: float
    images: int
    """Number of images that contain the cluster."""
    reason: str
    """Why the name is transferred or not."""


def count_overlap(pairs: Iterable[tuple[Segmentation, Segmentation]], old: Contract, new: Contract) -> ClusterOverlap:
    """Count co-occurrences in pairs of panoptic segmentations of an image, by an old and a new artifact.

    All images have the same weight, whatever their size.
    """
    rows, columns = (each.thing_clusters + each.stuff_clusters + 1 for each in (old, new))
    fractions, images = np.zeros((rows, columns)), np.zeros(columns, np.int64)
    for first, second in pairs:
        before, after = (each.map_clusters().astype(np.int64) for each in (first, second))
        counts = np.bincount((before * columns + after).ravel(), minlength=rows * columns).reshape(rows, columns)
        fractions += counts / before.size
        images += counts.any(0)
    return ClusterOverlap(fractions=fractions, images=images)


def propose_names(
    overlap: ClusterOverlap, old: Contract, new: Contract, thresholds: TransferThresholds
) -> list[NameProposal]:
    """Return a proposal for each new cluster that occurred; `old` has the names to transfer.

    Names of things go to things only, names of stuff to stuff only. Old clusters of the same name count together.
    """
    seen = np.flatnonzero(overlap.images[1:]) + 1
    return [_propose_name(int(cluster), overlap, old, new, thresholds) for cluster in seen]


def transfer_names(proposals: Iterable[NameProposal], old: Contract, new: Contract) -> CategoryNames:
    """Return the names of the proposals that are clear, for the new artifact."""
    timestamp, author = get_timestamp(), f"transferred from {old.name} {old.version}"
    names = {
        each.cluster: CategoryName(category_name=each.category_name, author=author, timestamp=timestamp)
        for each in proposals
        if each.category_name
    }
    return empty_names(new).replace_all(names, author)


def keep_user_names(contract: Contract, names: CategoryNames) -> Contract:
    """Return the contract with the names in `names` only, without its own."""
    named = names.apply(contract)
    return replace(named, categories={cluster: named.categories[cluster] for cluster in names.names})


def _propose_name(
    cluster: int, overlap: ClusterOverlap, old: Contract, new: Contract, thresholds: TransferThresholds
) -> NameProposal:
    column = overlap.fractions[:, cluster] / overlap.fractions[:, cluster].sum()
    by_name: dict[str, float] = {}
    for old_cluster in range(1, len(column)):
        if old.is_thing(old_cluster) == new.is_thing(cluster) and (category := old.categories.get(old_cluster)):
            by_name[category.name] = by_name.get(category.name, 0.0) + float(column[old_cluster])
    ranked = sorted(((fraction, name) for name, fraction in by_name.items() if fraction > 0.0), reverse=True)
    (first, best), (second, runner_up) = [*((value, str(name)) for value, name in ranked), *[(0.0, None)] * 2][:2]
    images = int(overlap.images[cluster])
    rejection = _rejection_reason(best, first, first - second, images, thresholds)
    return NameProposal(
        cluster=cluster,
        category_name=None if rejection else best,
        best=best,
        overlap=round(first, 4),
        runner_up=runner_up,
        runner_up_overlap=round(second, 4),
        images=images,
        reason=rejection or "clear",
    )


def _rejection_reason(
    best: str | None, overlap: float, margin: float, images: int, thresholds: TransferThresholds
) -> str:
    """Return why a name is not transferred; empty if it is."""
    if best is None:
        return "overlaps no named cluster"
    if images < thresholds.min_images:
        return f"in {images} images, {thresholds.min_images} are required"
    if overlap < thresholds.min_overlap:
        return f"{overlap:.0%} of it had this name, {thresholds.min_overlap:.0%} are required"
    if margin < thresholds.min_margin:
        return f"leads by {margin:.0%}, {thresholds.min_margin:.0%} are required"
    return ""
