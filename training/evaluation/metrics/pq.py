"""Panoptic quality and semantic IoU from additive counts: those of several pictures or processes add up."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from training.evaluation.overlap import OverlapMatrix

_MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class PanopticCounts:
    """Per category, of one picture or, with an axis more in front, of many."""

    iou: Float[np.ndarray, "*N C"]
    """Summed over matches."""
    matched: Float[np.ndarray, "*N C"]
    wrong: Float[np.ndarray, "*N C"]
    missed: Float[np.ndarray, "*N C"]
    unnamed: Float[np.ndarray, "*N C"]
    """Predicted segments whose cluster has no category, at the category that they cover most."""


@dataclass(frozen=True, kw_only=True)
class SemanticCounts:
    """Pixels per category, of one picture or, with an axis more in front, of many; true void is left out."""

    right: Float[np.ndarray, "*N C"]
    true: Float[np.ndarray, "*N C"]
    predicted: Float[np.ndarray, "*N C"]
    named: Float[np.ndarray, "*N C"]
    """True pixels that were given any category."""


def count_panoptic(overlap: OverlapMatrix, categories: int) -> PanopticCounts:
    """Matches and errors of one picture, as panopticapi counts them.

    A pair of one category matches above an IoU of 0.5, void taken out of the union; an unmatched prediction that lies
    mostly on void or on a crowd of its category is no error. Of two crowds of a category only the last excuses, which
    is that program's quirk.
    """
    shared = overlap.pixels[1:, 1:]
    areas, true_areas = overlap.pixels[1:].sum(1), overlap.pixels[:, 1:].sum(0)
    on_void = overlap.pixels[1:, 0]
    is_pair = (overlap.predicted[:, None] == overlap.true) & ~overlap.is_crowd & (shared > 0)
    rows, columns = np.nonzero(is_pair)
    union = areas[rows] + true_areas[columns] - shared[rows, columns] - on_void[rows]
    ratio = shared[rows, columns] / union
    rows, columns, ratio = (each[ratio > _MATCH_IOU] for each in (rows, columns, ratio))
    excused = on_void.astype(np.float64)
    for category, column in {int(overlap.true[column]): column for column in np.flatnonzero(overlap.is_crowd)}.items():
        on_crowd = overlap.predicted == category
        excused[on_crowd] += shared[on_crowd, column]
    is_wrong = excused <= _MATCH_IOU * areas  # also for a segment without a pixel
    is_wrong[rows] = False
    is_missed = ~overlap.is_crowd
    is_missed[columns] = False

    def count(places: Int[np.ndarray, "M"], weights: Float[np.ndarray, "M"] | None = None) -> Float[np.ndarray, "C"]:
        return np.bincount(places, weights=weights, minlength=categories).astype(np.float64)

    return PanopticCounts(
        iou=count(overlap.predicted[rows], ratio),
        matched=count(overlap.predicted[rows]),
        wrong=count(overlap.predicted[is_wrong]),
        missed=count(overlap.true[is_missed]),
        unnamed=np.zeros(categories),
    )


def count_unmapped(overlap: OverlapMatrix, table: Int[np.ndarray, "N"], categories: int) -> Float[np.ndarray, "C"]:
    """Predicted clusters for which `table` has no category, each at the category that it covers most.

    One that lies mostly on void is excused, as one with a name would be.
    """
    counts = np.zeros(categories)
    for row in np.flatnonzero(table[overlap.predicted] < 0) + 1:
        covered = overlap.pixels[row]
        if covered[1:].any() and covered[0] <= _MATCH_IOU * covered.sum():
            counts[overlap.true[covered[1:].argmax()]] += 1
    return counts


def panoptic_quality(
    counts: PanopticCounts, chosen: slice = slice(None), *, lenient: bool = False
) -> dict[str, Float[np.ndarray, "*N"]]:
    """PQ, SQ and RQ in 0..1, the mean over those of the `chosen` categories that occur at all.

    `lenient`: segments without a category cost nothing, as in the papers.
    """
    per_class = panoptic_quality_per_class(counts, lenient=lenient)
    occurs = (per_class["weight"] > 0)[..., chosen]
    share = occurs / np.maximum(occurs.sum(-1, keepdims=True), 1)
    return {name: (per_class[name][..., chosen] * share).sum(-1) for name in ("pq", "sq", "rq")}


def panoptic_quality_per_class(
    counts: PanopticCounts, *, lenient: bool = False
) -> dict[str, Float[np.ndarray, "*N C"]]:
    """PQ, SQ and RQ of each category in 0..1, and `weight`, which is 0 where it does not occur."""
    wrong = counts.wrong if lenient else counts.wrong + counts.unnamed
    weight = counts.matched + wrong / 2 + counts.missed / 2
    floor = np.where(weight > 0, weight, 1.0)
    return {
        "pq": counts.iou / floor,
        "sq": counts.iou / np.maximum(counts.matched, 1),
        "rq": counts.matched / floor,
        "weight": weight,
    }


def count_semantic(overlap: OverlapMatrix, categories: int) -> SemanticCounts:
    """Pixels of one picture; a prediction without a category is wrong wherever it lies on a true one."""
    shared = overlap.pixels[1:, 1:]
    right, true, predicted, named = np.zeros((4, categories))
    rows, columns = np.nonzero(overlap.predicted[:, None] == overlap.true)
    np.add.at(right, overlap.true[columns], shared[rows, columns])
    np.add.at(true, overlap.true, overlap.pixels[:, 1:].sum(0))
    np.add.at(named, overlap.true, shared.sum(0))
    np.add.at(predicted, overlap.predicted, shared.sum(1))
    return SemanticCounts(right=right, true=true, predicted=predicted, named=named)


def semantic_quality(
    counts: SemanticCounts, chosen: slice = slice(None), *, lenient: bool = False
) -> dict[str, Float[np.ndarray, "*N"]]:
    """Mean IoU over the `chosen` categories that are in the truth, and pixel accuracy over all, in 0..1.

    `lenient`: pixels that were given no category do not count at all, as in the papers.
    """
    true = counts.named if lenient else counts.true
    occurs = (true > 0)[..., chosen]
    iou = iou_per_class(counts, lenient=lenient)[..., chosen]
    return {
        "miou": (iou * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1),
        "accuracy": counts.right.sum(-1) / np.maximum(true.sum(-1), 1),
    }


def iou_per_class(counts: SemanticCounts, *, lenient: bool = False) -> Float[np.ndarray, "*N C"]:
    """The IoU of each category in 0..1."""
    true = counts.named if lenient else counts.true
    iou: Float[np.ndarray, "*N C"] = counts.right / np.maximum(true + counts.predicted - counts.right, 1)
    return iou
