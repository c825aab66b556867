"""Semantic IoU and pixel accuracy from counts that add up over images and processes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from training.evaluation.overlap import OverlapMatrix


@dataclass(frozen=True, kw_only=True)
class SemanticCounts:
    """Pixels by category, of one image or (with a first axis) of several, without void of the ground truth."""

    intersection: Float[np.ndarray, "*N C"]
    ground_truth: Float[np.ndarray, "*N C"]
    predicted: Float[np.ndarray, "*N C"]
    mapped: Float[np.ndarray, "*N C"]
    """Ground-truth pixels for which any category was predicted."""


def count_semantic(overlap: OverlapMatrix, num_categories: int) -> SemanticCounts:
    """Count the pixels of one image; a prediction without a category is an error on every labeled pixel."""
    shared = overlap.pixels[1:, 1:]
    intersection, ground_truth, predicted, mapped = np.zeros((4, num_categories))
    rows, columns = np.nonzero(overlap.predicted[:, None] == overlap.ground_truth)
    np.add.at(intersection, overlap.ground_truth[columns], shared[rows, columns])
    np.add.at(ground_truth, overlap.ground_truth, overlap.pixels[:, 1:].sum(0))
    np.add.at(mapped, overlap.ground_truth, shared.sum(0))
    np.add.at(predicted, overlap.predicted, shared.sum(1))
    return SemanticCounts(intersection=intersection, ground_truth=ground_truth, predicted=predicted, mapped=mapped)


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
