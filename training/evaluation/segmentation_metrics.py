"""Panoptic quality, semantic IoU and pixel accuracy, from counts that add up over images and processes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from training.evaluation.overlap import OverlapMatrix

_MIN_MATCH_IOU = 0.5


class PanopticCounts(NamedTuple):
    """Counts by category, of one image or (with a first axis) of several."""

    iou: Float[np.ndarray, "*N C"]
    """Sum of the IoU of true positives."""
    tp: Float[np.ndarray, "*N C"]
    fp: Float[np.ndarray, "*N C"]
    fn: Float[np.ndarray, "*N C"]
    unmapped: Float[np.ndarray, "*N C"]
    """False positives without a category, counted at the category that they cover most."""


def count_panoptic(overlap: OverlapMatrix, num_categories: int) -> PanopticCounts:
    """Count the true and false positives and false negatives of one image, as panopticapi does.

    Two segments of one category match above an IoU of 0.5, with void excluded from the union. An unmatched prediction
    that lies mostly on void or on a crowd of its category is no false positive. If a category has several crowds, only
    the last one is considered: a quirk of panopticapi that is kept.
    """
    shared = overlap.pixels[1:, 1:]
    areas, ground_truth_areas = overlap.pixels[1:].sum(1), overlap.pixels[:, 1:].sum(0)
    on_void = overlap.pixels[1:, 0]
    is_pair = (overlap.predicted[:, None] == overlap.ground_truth) & ~overlap.is_crowd & (shared > 0)
    rows, columns = np.nonzero(is_pair)
    union = areas[rows] + ground_truth_areas[columns] - shared[rows, columns] - on_void[rows]
    iou = shared[rows, columns] / union
    rows, columns, iou = (each[iou > _MIN_MATCH_IOU] for each in (rows, columns, iou))
    ignored = on_void.astype(np.float64)
    crowds = {int(overlap.ground_truth[column]): column for column in np.flatnonzero(overlap.is_crowd)}
    for category, column in crowds.items():
        of_category = overlap.predicted == category
        ignored[of_category] += shared[of_category, column]
    is_fp = ignored <= _MIN_MATCH_IOU * areas  # also true for a segment without pixels
    is_fp[rows] = False
    is_fn = ~overlap.is_crowd
    is_fn[columns] = False
    has_category = overlap.predicted >= 0
    covered_most = [shared[row].argmax() for row in np.flatnonzero(is_fp & ~has_category & shared.any(1))]

    def count(
        categories: Int[np.ndarray, "M"], weights: Float[np.ndarray, "M"] | None = None
    ) -> Float[np.ndarray, "C"]:
        return np.bincount(categories, weights=weights, minlength=num_categories).astype(np.float64)

    return PanopticCounts(
        iou=count(overlap.predicted[rows], iou),
        tp=count(overlap.predicted[rows]),
        fp=count(overlap.predicted[is_fp & has_category]),
        fn=count(overlap.ground_truth[is_fn]),
        unmapped=count(overlap.ground_truth[covered_most]),
    )


def panoptic_quality(
    counts: PanopticCounts, categories: slice = slice(None), *, ignore_unmapped: bool = False
) -> dict[str, Float[np.ndarray, "*N"]]:
    """Return PQ, SQ and RQ in 0..1, averaged over those of `categories` that occur.

    With `ignore_unmapped`, segments without a category are not counted as errors, as in the papers.
    """
    per_class = panoptic_quality_per_class(counts, ignore_unmapped=ignore_unmapped)
    occurs = (per_class["weight"] > 0)[..., categories]
    weights = occurs / np.maximum(occurs.sum(-1, keepdims=True), 1)
    return {name: (per_class[name][..., categories] * weights).sum(-1) for name in ("pq", "sq", "rq")}


def panoptic_quality_per_class(
    counts: PanopticCounts, *, ignore_unmapped: bool = False
) -> dict[str, Float[np.ndarray, "*N C"]]:
    """Return PQ, SQ and RQ of each category in 0..1, and `weight`, which is 0 for categories that do not occur."""
    fp = counts.fp if ignore_unmapped else counts.fp + counts.unmapped
    weight = counts.tp + fp / 2 + counts.fn / 2
    divisor = np.where(weight > 0, weight, 1.0)
    return {
        "pq": counts.iou / divisor,
        "sq": counts.iou / np.maximum(counts.tp, 1),
        "rq": counts.tp / divisor,
        "weight": weight,
    }


class SemanticCounts(NamedTuple):
    """Pixels by category, of one image or (with a first axis) of several, without void of the ground truth."""

    intersection: Float[np.ndarray, "*N C"]
    ground_truth: Float[np.ndarray, "*N C"]
    predicted: Float[np.ndarray, "*N C"]
    mapped: Float[np.ndarray, "*N C"]
    """Ground-truth pixels for which any category was predicted."""


def count_semantic(overlap: OverlapMatrix, num_categories: int) -> SemanticCounts:
    """Count the pixels of one image; a prediction without a category is an error on every labeled pixel."""
    confusion = np.zeros((num_categories + 1, num_categories))  # the last row: void and segments without a category
    rows = np.append(-1, overlap.predicted)
    np.add.at(confusion, (rows[:, None], overlap.ground_truth[None]), overlap.pixels[:, 1:])
    mapped = confusion[:-1]
    return SemanticCounts(
        intersection=mapped.diagonal(), ground_truth=confusion.sum(0), predicted=mapped.sum(1), mapped=mapped.sum(0)
    )


def semantic_quality(
    counts: SemanticCounts, categories: slice = slice(None), *, ignore_unmapped: bool = False
) -> dict[str, Float[np.ndarray, "*N"]]:
    """Return the mean IoU over those of `categories` that occur, and the pixel accuracy over all, in 0..1.

    With `ignore_unmapped`, pixels without a predicted category do not count, as in the papers.
    """
    ground_truth = counts.mapped if ignore_unmapped else counts.ground_truth
    occurs = (ground_truth > 0)[..., categories]
    iou = iou_per_class(counts, ignore_unmapped=ignore_unmapped)[..., categories]
    return {
        "miou": (iou * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1),
        "accuracy": counts.intersection.sum(-1) / np.maximum(ground_truth.sum(-1), 1),
    }


def iou_per_class(counts: SemanticCounts, *, ignore_unmapped: bool = False) -> Float[np.ndarray, "*N C"]:
    """Return the IoU of each category in 0..1."""
    ground_truth = counts.mapped if ignore_unmapped else counts.ground_truth
    union = ground_truth + counts.predicted - counts.intersection
    iou: Float[np.ndarray, "*N C"] = counts.intersection / np.maximum(union, 1)
    return iou
