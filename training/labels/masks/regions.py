"""Regions that grow together: an agglomerative segmentation of one view of the features."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_UNKNOWN = -2.0
"""In place of a similarity that has yet to be computed."""


def merge_regions(
    view: Float[np.ndarray, "h w C"], thresholds: Sequence[float], areas: tuple[int, int]
) -> Bool[np.ndarray, "N h w"]:
    """Every region that is there once all neighbours more alike than a threshold have merged; thresholds descend.

    Starts from the patches; two neighbouring regions that are most alike to each other merge, all such pairs at once,
    and a region's feature is the mean of its patches (of unit length). Only regions of `areas` patches, least and
    most, are given, each once.
    """
    height, width, _ = view.shape
    labels = np.arange(height * width)
    sums = view.reshape(height * width, -1).astype(np.float32)
    edges = _list_neighbours(height, width)
    alike = np.full(len(edges), _UNKNOWN, np.float32)
    found: dict[tuple[int, int], Bool[np.ndarray, "P"]] = {}
    for threshold in thresholds:
        while True:
            _measure(sums, edges, alike)
            table = _pair_up(edges, alike, threshold, len(sums))
            if table is None:
                break
            labels = table[labels]
            sums, edges, alike = _contract(sums, edges, alike, table)
        sizes = np.bincount(labels)
        first = np.full(len(sizes), len(labels))
        np.minimum.at(first, labels, np.arange(len(labels)))
        for each in np.flatnonzero((sizes >= areas[0]) & (sizes <= areas[1])):
            # Regions of one hierarchy are alike if their size and their first patch are.
            found.setdefault((int(sizes[each]), int(first[each])), labels == each)
    return np.array(list(found.values()), bool).reshape(len(found), height, width)


def _list_neighbours(height: int, width: int) -> Int[np.ndarray, "E 2"]:
    grid = np.arange(height * width).reshape(height, width)
    across = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1)
    down = np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1)
    return np.concatenate([across, down])


def _measure(sums: Float[np.ndarray, "R C"], edges: Int[np.ndarray, "E 2"], alike: Float[np.ndarray, "E"]) -> None:
    """Fill in the cosines that are unknown."""
    unknown = np.flatnonzero(alike == _UNKNOWN)
    if not len(unknown):
        return
    units = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    ends = edges[unknown]
    alike[unknown] = np.einsum("ec,ec->e", units[ends[:, 0]], units[ends[:, 1]])


def _pair_up(
    edges: Int[np.ndarray, "E 2"], alike: Float[np.ndarray, "E"], threshold: float, count: int
) -> Int[np.ndarray, "R"] | None:
    """The new number of each region once mutual best neighbours above the threshold are one; None if there are none."""
    close = np.flatnonzero(alike > threshold)
    if not len(close):
        return None
    ascending = close[np.argsort(alike[close], kind="stable")]
    best = np.full(count, -1)
    best[edges[ascending].ravel()] = np.repeat(ascending, 2)  # of several values the last one stays
    ends = edges[close]
    mutual = ends[(best[ends[:, 0]] == close) & (best[ends[:, 1]] == close)]
    parents = np.arange(count)
    parents[mutual[:, 1]] = mutual[:, 0]
    table: Int[np.ndarray, "R"] = np.unique(parents, return_inverse=True)[1]
    return table


def _contract(
    sums: Float[np.ndarray, "R C"],
    edges: Int[np.ndarray, "E 2"],
    alike: Float[np.ndarray, "E"],
    table: Int[np.ndarray, "R"],
) -> tuple[Float[np.ndarray, "r C"], Int[np.ndarray, "e 2"], Float[np.ndarray, "e"]]:
    """Sums, edges and what is still known of their similarities, after regions got the numbers in `table`."""
    count = int(table.max()) + 1
    is_merged = np.bincount(table, minlength=count) > 1
    order = np.argsort(table, kind="stable")
    starts = np.searchsorted(table[order], np.arange(count))
    merged = np.add.reduceat(sums[order], starts, axis=0)
    ends = np.sort(table[edges], axis=1)
    kept = np.flatnonzero(ends[:, 0] != ends[:, 1])
    _, chosen = np.unique(ends[kept, 0] * count + ends[kept, 1], return_index=True)
    kept = kept[chosen]
    ends = ends[kept]
    known = np.where(is_merged[ends].any(1), np.float32(_UNKNOWN), alike[kept])
    return merged, ends, known
