"""Object masks that several views of the features agree on."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from training.labels.masks.discover import CutPlan, normalise_tokens, propose
from training.labels.masks.proposals import Proposals
from training.labels.masks.regions import merge_regions

THRESHOLDS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Cosines down to which neighbouring regions merge, one segmentation each."""
_CUTS = CutPlan(cuts=3, threshold=0.3)
_LEAST_PATCHES = 4
_MOST_SHARE = 0.9
"""Of the photo."""
_SAME = 0.7
"""IoU from which two masks are one object."""
_CONTRAST = 5.0
"""What a contrast of one is worth beside one agreeing view."""
_BORDER = 0.5
_RING = 2
"""Patches around a mask that it is compared with."""


def vote(tokens: Float[np.ndarray, "h w C"], views: Sequence[Float[np.ndarray, "h w V"]]) -> Proposals:
    """Objects, best first, as the weighted mean of the masks that show each.

    Candidates are the regions that merge in each view, and MaskCut's on `tokens`, which is a view of its own. A
    candidate's score is the sum over views of its best IoU there, if 0.7 or more, and five times its contrast in
    `tokens`; the best is taken with all that overlap it by 0.7 and more, then the best of the rest.
    Raises LabelStoreError if `tokens` are not finite.
    """
    unit = normalise_tokens(tokens, is_centred=False)
    height, width = tokens.shape[:2]
    areas = _LEAST_PATCHES, int(_MOST_SHARE * height * width)
    found = [merge_regions(view, THRESHOLDS, areas) for view in views]
    found.append(propose(tokens, _CUTS))
    candidates = np.concatenate(found)
    if not len(candidates):
        return Proposals(soft=np.zeros((0, height, width), np.float32), scores=np.zeros(0, np.float32))
    starts = np.cumsum([0, *map(len, found)])
    overlaps = measure_overlaps(candidates)
    agreeing = np.where(overlaps >= _SAME, overlaps, 0.0)
    best = [agreeing[:, low:high].max(1) for low, high in pairwise(starts) if high > low]
    scores = np.sum(best, axis=0) + _CONTRAST * measure_contrast(candidates, unit)
    return _gather(candidates, overlaps, scores)


def measure_overlaps(masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N N"]:
    """Intersection over union of each two masks, none of them empty."""
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    shared = flat @ flat.T
    sizes = np.diag(shared)
    overlaps: Float[np.ndarray, "N N"] = shared / (sizes[:, None] + sizes - shared)
    return overlaps


def measure_contrast(masks: Bool[np.ndarray, "N h w"], unit: Float[np.ndarray, "h w C"]) -> Float[np.ndarray, "N"]:
    """How much more alike a mask's patches are to their mean than a ring around it is.

    A mask that runs out of the photo loses by it: half its share of the photo's border. `unit` are tokens of unit
    length, mean and all: without the mean, the pockets of ground that an object encloses stand out most.
    """
    flat = unit.reshape(-1, unit.shape[-1])
    inside = masks.reshape(len(masks), -1).astype(np.float32)
    ring = (_widen(masks, _RING) & ~masks).reshape(inside.shape).astype(np.float32)
    prototypes = inside @ flat
    prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    alike = prototypes @ flat.T
    within = (alike * inside).sum(1) / inside.sum(1)
    around = (alike * ring).sum(1) / np.maximum(ring.sum(1), 1.0)
    border = np.zeros(masks.shape[1:], bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    contrast: Float[np.ndarray, "N"] = within - around - _BORDER * masks[:, border].mean(1)
    return contrast


def _widen(masks: Bool[np.ndarray, "N h w"], patches: int) -> Bool[np.ndarray, "N h w"]:
    """Masks and the patches at most so far away, up and down, left and right."""
    wide = masks
    for axis in (1, 2):
        span = np.pad(wide, [(0, 0)] + [(patches,) * 2 if each == axis else (0, 0) for each in (1, 2)])
        length = wide.shape[axis]
        wide = np.any([span.take(range(shift, shift + length), axis) for shift in range(2 * patches + 1)], axis=0)
    return wide


def _gather(
    candidates: Bool[np.ndarray, "N h w"], overlaps: Float[np.ndarray, "N N"], scores: Float[np.ndarray, "N"]
) -> Proposals:
    """Groups around the best candidates, each the mean of its members weighted by their scores."""
    weights = np.maximum(scores, 1e-3)
    is_free = np.ones(len(candidates), bool)
    seeds: list[int] = []
    soft: list[Float[np.ndarray, "h w"]] = []
    order: Int[np.ndarray, "N"] = np.argsort(-scores, kind="stable")
    for each in order:
        if not is_free[each]:
            continue
        members = np.flatnonzero(is_free & (overlaps[each] >= _SAME))
        is_free[members] = False
        seeds.append(int(each))
        soft.append(np.average(candidates[members], axis=0, weights=weights[members]))
    return Proposals(
        soft=np.array(soft, np.float32).reshape(len(soft), *candidates.shape[1:]),
        scores=scores[seeds].astype(np.float32),
    )
