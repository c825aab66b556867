"""Object masks that several views of the features agree on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from model.errors import LabelStoreError
from model.files import atomic_write, load_npz
from training.pseudo_labels.kmeans import fit_whitening
from training.pseudo_labels.maskcut import MaskCutConfig, MaskProposals, l2_normalize_tokens, maskcut

THRESHOLDS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Cosines down to which neighbouring regions merge, one segmentation each."""
_CUTS = MaskCutConfig(maskcut_n=3, threshold=0.3)
_MIN_PATCHES = 4
_MAX_AREA_FRACTION = 0.9
"""Of the photo."""
_SAME_OBJECT_IOU = 0.7
"""IoU from which two masks are one object."""
_CONTRAST_WEIGHT = 5.0
"""What a contrast of one is worth beside one agreeing view."""
_BORDER_PENALTY = 0.5
_RING_WIDTH = 2
"""Patches around a mask that it is compared with."""


def consensus_masks(tokens: Float[np.ndarray, "h w C"], views: Sequence[Float[np.ndarray, "h w V"]]) -> MaskProposals:
    """Objects, best first, as the weighted mean of the masks that show each.

    Candidates are the regions that merge in each view, and MaskCut's on `tokens`, which is a view of its own. A
    candidate's score is the sum over views of its best IoU there, if 0.7 or more, and five times its contrast in
    `tokens`; the best is taken with all that overlap it by 0.7 and more, then the best of the rest.
    Raises LabelStoreError if `tokens` are not finite.
    """
    unit = l2_normalize_tokens(tokens, is_centred=False)
    height, width = tokens.shape[:2]
    areas = _MIN_PATCHES, int(_MAX_AREA_FRACTION * height * width)
    found = [agglomerative_regions(view, THRESHOLDS, areas) for view in views]
    found.append(maskcut(tokens, _CUTS))
    candidates = np.concatenate(found)
    if not len(candidates):
        return MaskProposals(soft=np.zeros((0, height, width), np.float32), scores=np.zeros(0, np.float32))
    starts = np.cumsum([0, *map(len, found)])
    overlaps = pairwise_mask_iou(candidates)
    agreeing = np.where(overlaps >= _SAME_OBJECT_IOU, overlaps, 0.0)
    best = [agreeing[:, low:high].max(1) for low, high in pairwise(starts) if high > low]
    scores = np.sum(best, axis=0) + _CONTRAST_WEIGHT * feature_contrast(candidates, unit)
    return _group_candidates(candidates, overlaps, scores)


def pairwise_mask_iou(masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N N"]:
    """Intersection over union of each two masks, none of them empty."""
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    shared = flat @ flat.T
    sizes = np.diag(shared)
    overlaps: Float[np.ndarray, "N N"] = shared / (sizes[:, None] + sizes - shared)
    return overlaps


def feature_contrast(masks: Bool[np.ndarray, "N h w"], unit: Float[np.ndarray, "h w C"]) -> Float[np.ndarray, "N"]:
    """How much more alike a mask's patches are to their mean than a ring around it is.

    A mask that runs out of the photo loses by it: half its share of the photo's border. `unit` are tokens of unit
    length, mean and all: without the mean, the pockets of ground that an object encloses stand out most.
    """
    flat = unit.reshape(-1, unit.shape[-1])
    inside = masks.reshape(len(masks), -1).astype(np.float32)
    ring = (_dilate(masks, _RING_WIDTH) & ~masks).reshape(inside.shape).astype(np.float32)
    prototypes = inside @ flat
    prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    alike = prototypes @ flat.T
    within = (alike * inside).sum(1) / inside.sum(1)
    around = (alike * ring).sum(1) / np.maximum(ring.sum(1), 1.0)
    border = np.zeros(masks.shape[1:], bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    contrast: Float[np.ndarray, "N"] = within - around - _BORDER_PENALTY * masks[:, border].mean(1)
    return contrast


def _dilate(masks: Bool[np.ndarray, "N h w"], patches: int) -> Bool[np.ndarray, "N h w"]:
    """Masks and the patches at most so far away, up and down, left and right."""
    wide = masks
    for axis in (1, 2):
        span = np.pad(wide, [(0, 0)] + [(patches,) * 2 if each == axis else (0, 0) for each in (1, 2)])
        length = wide.shape[axis]
        wide = np.any([span.take(range(shift, shift + length), axis) for shift in range(2 * patches + 1)], axis=0)
    return wide


def _group_candidates(
    candidates: Bool[np.ndarray, "N h w"], overlaps: Float[np.ndarray, "N N"], scores: Float[np.ndarray, "N"]
) -> MaskProposals:
    """Groups around the best candidates, each the mean of its members weighted by their scores."""
    weights = np.maximum(scores, 1e-3)
    is_free = np.ones(len(candidates), bool)
    seeds: list[int] = []
    soft: list[Float[np.ndarray, "h w"]] = []
    order: Int[np.ndarray, "N"] = np.argsort(-scores, kind="stable")
    for each in order:
        if not is_free[each]:
            continue
        members = np.flatnonzero(is_free & (overlaps[each] >= _SAME_OBJECT_IOU))
        is_free[members] = False
        seeds.append(int(each))
        soft.append(np.average(candidates[members], axis=0, weights=weights[members]))
    return MaskProposals(
        soft=np.array(soft, np.float32).reshape(len(soft), *candidates.shape[1:]),
        scores=scores[seeds].astype(np.float32),
    )


_UNKNOWN = -2.0
"""In place of a similarity that has yet to be computed."""


def agglomerative_regions(
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
    edges = _grid_edges(height, width)
    alike = np.full(len(edges), _UNKNOWN, np.float32)
    found: dict[tuple[int, int], Bool[np.ndarray, "P"]] = {}
    for threshold in thresholds:
        while True:
            _update_similarities(sums, edges, alike)
            table = _merge_mutual_neighbors(edges, alike, threshold, len(sums))
            if table is None:
                break
            labels = table[labels]
            sums, edges, alike = _contract_graph(sums, edges, alike, table)
        sizes = np.bincount(labels)
        first = np.full(len(sizes), len(labels))
        np.minimum.at(first, labels, np.arange(len(labels)))
        for each in np.flatnonzero((sizes >= areas[0]) & (sizes <= areas[1])):
            # Regions of one hierarchy are alike if their size and their first patch are.
            found.setdefault((int(sizes[each]), int(first[each])), labels == each)
    return np.array(list(found.values()), bool).reshape(len(found), height, width)


def _grid_edges(height: int, width: int) -> Int[np.ndarray, "E 2"]:
    grid = np.arange(height * width).reshape(height, width)
    across = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1)
    down = np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1)
    return np.concatenate([across, down])


def _update_similarities(
    sums: Float[np.ndarray, "R C"], edges: Int[np.ndarray, "E 2"], alike: Float[np.ndarray, "E"]
) -> None:
    """Fill in the cosines that are unknown."""
    unknown = np.flatnonzero(alike == _UNKNOWN)
    if not len(unknown):
        return
    units = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    ends = edges[unknown]
    alike[unknown] = np.einsum("ec,ec->e", units[ends[:, 0]], units[ends[:, 1]])


def _merge_mutual_neighbors(
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


def _contract_graph(
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


_WHITENED_DIM = 64
_HALF_WHITENED_DIM = 128


@dataclass(frozen=True, kw_only=True)
class FeatureProjections:
    """Mean and principal axes of the tokens of all photos."""

    mean: Float[np.ndarray, "C"]
    projection: Float[np.ndarray, "C P"]
    """The first axes, each divided by its deviation."""

    def look(self, tokens: Float[np.ndarray, "h w C"]) -> list[Float[np.ndarray, "h w V"]]:
        """Unit tokens without the mean; whitened on 64 axes; divided by the root of the deviation on 128."""
        centred = tokens - self.mean
        deviations = 1.0 / np.linalg.norm(self.projection, axis=0)
        white = centred @ self.projection
        return [_l2_normalize(view) for view in (centred, white[..., :_WHITENED_DIM], white * np.sqrt(deviations))]

    def write(self, path: Path) -> None:
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, **asdict(self))


def fit_projections(sample: Float[np.ndarray, "N C"]) -> FeatureProjections:
    """Raises ConfigError if there are too few tokens to tell axes."""
    mean, projection = fit_whitening(sample, min(_HALF_WHITENED_DIM, sample.shape[1]))
    return FeatureProjections(mean=mean, projection=projection.astype(np.float32))


def load_projections(path: Path) -> FeatureProjections:
    """Raises LabelStoreError if the file is missing or holds something else."""
    try:
        return FeatureProjections(**load_npz(path))
    except (ValueError, TypeError) as error:
        raise LabelStoreError(f"{path} holds no views: {error}") from error


def _l2_normalize(view: Float[np.ndarray, "h w V"]) -> Float[np.ndarray, "h w V"]:
    unit: Float[np.ndarray, "h w V"] = view / np.maximum(np.linalg.norm(view, axis=-1, keepdims=True), 1e-12)
    return unit
