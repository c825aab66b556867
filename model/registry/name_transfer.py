"""Transfer of cluster names between two artifacts, by how both segment the same photos."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from model.contract import Contract
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


def propose_names(
    pairs: Iterable[tuple[Segmentation, Segmentation]], old: Contract, new: Contract, thresholds: TransferThresholds
) -> list[NameProposal]:
    """Return a proposal for each new cluster in pairs of panoptic segmentations of an image, by `old` and `new`.

    `old` has the names to transfer. Names of things go to things only, names of stuff to stuff only. Old clusters of
    the same name count together. All images have the same weight, whatever their size.
    """
    rows, columns = (each.thing_clusters + each.stuff_clusters + 1 for each in (old, new))
    fractions, images = np.zeros((rows, columns)), np.zeros(columns, np.int64)  # row and column 0 are void
    for first, second in pairs:
        before, after = (each.map_clusters().astype(np.int64) for each in (first, second))
        counts = np.bincount((before * columns + after).ravel(), minlength=rows * columns).reshape(rows, columns)
        fractions += counts / before.size
        images += counts.any(0)
    return [
        _propose_name(cluster, fractions[:, cluster], int(images[cluster]), old, new, thresholds)
        for cluster in range(1, columns)
        if images[cluster]
    ]


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
    cluster: int,
    overlaps: Float[np.ndarray, "O+1"],
    images: int,
    old: Contract,
    new: Contract,
    thresholds: TransferThresholds,
) -> NameProposal:
    """Return the proposal for a cluster that is in this number of images and overlaps old clusters this much."""
    by_name: dict[str, float] = {}
    for old_cluster, category in old.categories.items():
        if old.is_thing(old_cluster) == new.is_thing(cluster):
            fraction = float(overlaps[old_cluster] / overlaps.sum())
            by_name[category.name] = by_name.get(category.name, 0.0) + fraction
    ranked = sorted(((fraction, name) for name, fraction in by_name.items() if fraction > 0.0), reverse=True)
    (first, best), (second, runner_up) = [*((value, str(name)) for value, name in ranked), *[(0.0, None)] * 2][:2]
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
