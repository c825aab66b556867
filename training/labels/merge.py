"""Things over stuff: the panoptic pseudo-label."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32

from training.choices import MergeRule

_MOST_COVERED = 0.7


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A pseudo-label: segment ids per pixel (0 is void) and the category of each, things first."""

    label_map: Int32[np.ndarray, "H W"]
    categories: dict[int, int]


def merge(
    masks: Bool[np.ndarray, "N H W"],
    things: list[int],
    stuff: Int32[np.ndarray, "H W"],
    thing_clusters: int,
    thing_like: frozenset[int] = frozenset(),
) -> Labelled:
    """Masks painted over stuff, both as categories: things 1..K, stuff K+1..K+S.

    U2Seg, equation 5 and its generate_pseudo_panoptic.py: masks by descending box area, so that small objects come to
    lie on large ones; a stuff cluster more than 70 % covered by things is left void, else its free part is one segment.
    `things` are the masks' clusters, counted from 1, as `stuff` is; stuff 0 is none. The public rule teaches an object
    that no mask found as stuff; the improved one leaves void what is in no mask of the stuff clusters in `thing_like`.
    """
    label_map = np.zeros(stuff.shape, np.int32)
    categories: dict[int, int] = {}
    by_size = np.argsort([-_measure_box(mask) for mask in masks], kind="stable")
    for segment_id, index in enumerate(by_size, start=1):
        label_map[masks[index]] = segment_id
        categories[segment_id] = things[index]
    for hidden in set(categories) - set(np.unique(label_map).tolist()):
        del categories[hidden]
    is_covered = label_map > 0
    for label in np.unique(stuff):
        region = stuff == label
        free = region & ~is_covered
        if not label or int(label) in thing_like or not free.any() or 1.0 - free.sum() / region.sum() > _MOST_COVERED:
            continue
        segment_id = len(masks) + int(label)
        label_map[free] = segment_id
        categories[segment_id] = thing_clusters + int(label)
    return Labelled(label_map=label_map, categories=categories)


def list_thing_like(inside: Float[np.ndarray, "S"], most_inside: float, rule: MergeRule) -> frozenset[int]:
    """Stuff clusters, counted from 1, that the rule takes for things: more than `most_inside` of them lies in masks."""
    clusters = np.flatnonzero(inside > most_inside) + 1
    return frozenset(clusters.tolist()) if rule == "improved" else frozenset()


def _measure_box(mask: Bool[np.ndarray, "H W"]) -> int:
    _, _, width, height = cv2.boundingRect(mask.view(np.uint8))
    return int(width * height)
