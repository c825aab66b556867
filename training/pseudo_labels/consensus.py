"""Consensus masks: regions on which several projections of the features agree."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from model.embeddings import l2_normalize
from model.errors import DatasetError
from model.files import atomic_write, load_npz
from training.data.label_config import MaskDiscoveryConfig
from training.pseudo_labels.maskcut import MaskProposals, l2_normalize_tokens, maskcut

THRESHOLDS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Cosine similarities down to which neighboring regions merge, one segmentation each."""
WHITENED_DIM = 64
HALF_WHITENED_DIM = 128
_MASKCUT = MaskDiscoveryConfig(proposals="maskcut", maskcut_n=3, maskcut_tau=0.3)
_MIN_PATCHES = 4
_MAX_AREA_FRACTION = 0.9
_SAME_OBJECT_IOU = 0.7
_CONTRAST_WEIGHT = 5.0
"""Weight of the feature contrast in a score; each agreeing projection adds at most 1."""
_BORDER_PENALTY = 0.5
_RING_WIDTH = 2
"""In patches: width of the ring around a mask that its features are compared with."""
_MIN_SCORE_WEIGHT = 1e-3
_UNKNOWN = -2.0
"""Marks a similarity that has not been computed yet."""


@dataclass(frozen=True, kw_only=True)
class FeatureProjections:
    """Mean and principal axes of the tokens of all photos."""

    mean: Float[np.ndarray, "C"]
    projection: Float[np.ndarray, "C P"]
    """The first principal axes, each divided by its standard deviation."""

    def transform(self, tokens: Float[np.ndarray, "h w C"]) -> list[Float[np.ndarray, "h w V"]]:
        """Return three projections of unit length: centered; whitened in 64 dimensions; half whitened in 128.

        Half whitening divides each axis by the square root of its standard deviation.
        """
        centered = tokens - self.mean
        deviations = 1.0 / np.linalg.norm(self.projection, axis=0)
        white = centered @ self.projection
        return [l2_normalize(each) for each in (centered, white[..., :WHITENED_DIM], white * np.sqrt(deviations))]

    def write(self, path: Path) -> None:
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, **asdict(self))


def load_projections(path: Path) -> FeatureProjections:
    """Raises DatasetError if the file is missing or damaged."""
    try:
        return FeatureProjections(**load_npz(path))
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path} holds no feature projections: {error}") from error


def consensus_masks(
    tokens: Float[np.ndarray, "h w C"], projections: Sequence[Float[np.ndarray, "h w V"]]
) -> MaskProposals:
    """Return object masks, best first, each the weighted mean of the candidates that show the object.

    Candidates are the regions of an agglomerative segmentation of each projection, and the masks of MaskCut on
    `tokens`, which count as one more projection. The score of a candidate is the sum over the projections of its best
    IoU there, if at least 0.7, plus five times its feature contrast in `tokens`. The best candidate is grouped with all
    that overlap it by an IoU of at least 0.7, then the best of the rest, and so on.
    Raises DatasetError if `tokens` are not finite.
    """
    unit = l2_normalize_tokens(tokens, subtract_mean=False)
    height, width = tokens.shape[:2]
    areas = _MIN_PATCHES, int(_MAX_AREA_FRACTION * height * width)
    found = [agglomerative_regions(each, THRESHOLDS, areas) for each in projections]
    found.append(maskcut(tokens, _MASKCUT))
    candidates = np.concatenate(found)
    if not len(candidates):
        return MaskProposals(soft=np.zeros((0, height, width), np.float32), scores=np.zeros(0, np.float32))
    starts = np.cumsum([0, *map(len, found)])
    ious = pairwise_mask_iou(candidates, candidates)
    agreeing = np.where(ious >= _SAME_OBJECT_IOU, ious, 0.0)
    best = [agreeing[:, low:high].max(1) for low, high in pairwise(starts) if high > low]
    scores = np.sum(best, axis=0) + _CONTRAST_WEIGHT * feature_contrast(candidates, unit)
    return _group_candidates(candidates, ious, scores)


def pairwise_mask_iou(masks: Bool[np.ndarray, "N h w"], others: Bool[np.ndarray, "M h w"]) -> Float[np.ndarray, "N M"]:
    """Return the IoU of all pairs; 0 for two empty masks."""
    first, second = (each.reshape(len(each), math.prod(each.shape[1:])).astype(np.float32) for each in (masks, others))
    intersection = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1)[None] - intersection
    ious: Float[np.ndarray, "N M"] = intersection / np.maximum(union, 1.0)
    return ious


def group_by_iou(
    ious: Float[np.ndarray, "N N"], scores: Float[np.ndarray, "N"], min_iou: float
) -> Iterator[tuple[int, Int[np.ndarray, "n"]]]:
    """Yield the best mask that is in no group yet, and the group: all such masks with at least this IoU with it."""
    is_free = np.ones(len(scores), bool)
    for seed in np.argsort(-scores, kind="stable"):
        if is_free[seed]:
            members = np.flatnonzero(is_free & (ious[seed] >= min_iou))
            is_free[members] = False
            yield int(seed), members


def feature_contrast(masks: Bool[np.ndarray, "N h w"], unit: Float[np.ndarray, "h w C"]) -> Float[np.ndarray, "N"]:
    """Return how much more similar to a mask's mean feature its own patches are than a ring around it.

    Half the fraction of the photo's border that a mask touches is subtracted. `unit` are tokens of unit length whose
    mean was not subtracted: without the mean, background enclosed by an object would have the highest contrast.
    """
    flat = unit.reshape(-1, unit.shape[-1])
    inside = masks.reshape(len(masks), -1).astype(np.float32)
    wide = ndimage.maximum_filter(masks, (1, 2 * _RING_WIDTH + 1, 2 * _RING_WIDTH + 1))
    ring = (wide & ~masks).reshape(inside.shape).astype(np.float32)
    prototypes = inside @ flat
    prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    similarities = prototypes @ flat.T
    within = (similarities * inside).sum(1) / inside.sum(1)
    around = (similarities * ring).sum(1) / np.maximum(ring.sum(1), 1.0)
    border = np.zeros(masks.shape[1:], bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    contrast: Float[np.ndarray, "N"] = within - around - _BORDER_PENALTY * masks[:, border].mean(1)
    return contrast


def agglomerative_regions(
    features: Float[np.ndarray, "h w C"], thresholds: Sequence[float], areas: tuple[int, int]
) -> Bool[np.ndarray, "N h w"]:
    """Return every region that exists after merging neighbors above each of the descending similarity thresholds.

    Starts from single patches. Two neighboring regions that are each other's most similar neighbor merge, all such
    pairs at once; the feature of a region is the mean of its patches' unit vectors. Only regions with a number of
    patches within `areas` (minimum, maximum) are returned, each once.
    """
    height, width, _ = features.shape
    labels = np.arange(height * width)
    sums = features.reshape(height * width, -1).astype(np.float32)
    edges = _grid_edges(height, width)
    similarities = np.full(len(edges), _UNKNOWN, np.float32)
    found: dict[tuple[int, int], Bool[np.ndarray, "P"]] = {}
    for threshold in thresholds:
        while True:
            _update_similarities(sums, edges, similarities)
            new_index = _merge_mutual_neighbors(edges, similarities, threshold, len(sums))
            if new_index is None:
                break
            labels = new_index[labels]
            sums, edges, similarities = _contract_graph(sums, edges, similarities, new_index)
        sizes = np.bincount(labels)
        first = np.full(len(sizes), len(labels))
        np.minimum.at(first, labels, np.arange(len(labels)))
        for each in np.flatnonzero((sizes >= areas[0]) & (sizes <= areas[1])):
            # Within one hierarchy, regions with the same size and the same first patch are equal.
            found.setdefault((int(sizes[each]), int(first[each])), labels == each)
    return np.array(list(found.values()), bool).reshape(len(found), height, width)


def _group_candidates(
    candidates: Bool[np.ndarray, "N h w"], ious: Float[np.ndarray, "N N"], scores: Float[np.ndarray, "N"]
) -> MaskProposals:
    """Group candidates around the best ones; each group is the mean of its members weighted by their scores."""
    weights = np.maximum(scores, _MIN_SCORE_WEIGHT)
    groups = list(group_by_iou(ious, scores, _SAME_OBJECT_IOU))
    soft = [np.average(candidates[members], axis=0, weights=weights[members]) for _, members in groups]
    return MaskProposals(
        soft=np.array(soft, np.float32).reshape(len(soft), *candidates.shape[1:]),
        scores=scores[[seed for seed, _ in groups]].astype(np.float32),
    )


def _grid_edges(height: int, width: int) -> Int[np.ndarray, "E 2"]:
    """Return the index pairs of horizontally and vertically neighboring patches."""
    grid = np.arange(height * width).reshape(height, width)
    horizontal = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1)
    vertical = np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1)
    return np.concatenate([horizontal, vertical])


def _update_similarities(
    sums: Float[np.ndarray, "R C"], edges: Int[np.ndarray, "E 2"], similarities: Float[np.ndarray, "E"]
) -> None:
    """Compute the cosine similarities that are unknown, in place."""
    unknown = np.flatnonzero(similarities == _UNKNOWN)
    if not len(unknown):
        return
    units = l2_normalize(sums)
    ends = edges[unknown]
    similarities[unknown] = np.einsum("ec,ec->e", units[ends[:, 0]], units[ends[:, 1]])


def _merge_mutual_neighbors(
    edges: Int[np.ndarray, "E 2"], similarities: Float[np.ndarray, "E"], threshold: float, count: int
) -> Int[np.ndarray, "R"] | None:
    """Return the new index of each region after merging mutual best neighbors above the threshold.

    None if there are none.
    """
    close = np.flatnonzero(similarities > threshold)
    if not len(close):
        return None
    ascending = close[np.argsort(similarities[close], kind="stable")]
    best = np.full(count, -1)
    best[edges[ascending].ravel()] = np.repeat(ascending, 2)  # of several values the last one stays
    ends = edges[close]
    mutual = ends[(best[ends[:, 0]] == close) & (best[ends[:, 1]] == close)]
    parents = np.arange(count)
    parents[mutual[:, 1]] = mutual[:, 0]
    new_index: Int[np.ndarray, "R"] = np.unique(parents, return_inverse=True)[1]
    return new_index


def _contract_graph(
    sums: Float[np.ndarray, "R C"],
    edges: Int[np.ndarray, "E 2"],
    similarities: Float[np.ndarray, "E"],
    new_index: Int[np.ndarray, "R"],
) -> tuple[Float[np.ndarray, "r C"], Int[np.ndarray, "e 2"], Float[np.ndarray, "e"]]:
    """Return the sums, edges and still valid similarities of the merged regions."""
    count = int(new_index.max()) + 1
    is_merged = np.bincount(new_index, minlength=count) > 1
    order = np.argsort(new_index, kind="stable")
    starts = np.searchsorted(new_index[order], np.arange(count))
    merged = np.add.reduceat(sums[order], starts, axis=0)
    ends = np.sort(new_index[edges], axis=1)
    kept = np.flatnonzero(ends[:, 0] != ends[:, 1])
    _, selected = np.unique(ends[kept, 0] * count + ends[kept, 1], return_index=True)
    kept = kept[selected]
    ends = ends[kept]
    known = np.where(is_merged[ends].any(1), np.float32(_UNKNOWN), similarities[kept])
    return merged, ends, known
