"""Pixels shared by the segments of two label maps, and the panoptic and semantic metrics that are counted from them.

Counts add up over images and processes.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from model.postprocessing.panoptic import ids_to_positions

_MIN_MATCH_IOU = 0.5


@dataclass(frozen=True)
class StoredArray:
    """Annotation with which pydantic reads and writes an array as nested lists."""

    dtype: type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: None if value is None else np.array(value, self.dtype),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda array: None if array is None else array.tolist()
            ),
        )


@dataclass(frozen=True, kw_only=True)
class OverlapMatrix:
    """Pixels shared by each predicted and each ground-truth segment; row 0 and column 0 are void."""

    pixels: Annotated[Int[np.ndarray, "P+1 T+1"], StoredArray(np.int64)]
    predicted: Annotated[Int[np.ndarray, "P"], StoredArray(np.int64)]
    """Class of each predicted segment: a cluster, or a category index once mapped; -1 for none."""
    ground_truth: Annotated[Int[np.ndarray, "T"], StoredArray(np.int64)]
    """Category index of each ground-truth segment."""
    is_crowd: Annotated[Bool[np.ndarray, "T"], StoredArray(bool)]
    embeddings: Annotated[Float32[np.ndarray, "P E"] | None, StoredArray(np.float32)] = None
    """Of the predicted segments; None if the network has no embeddings."""


def compute_overlap(
    predicted_map: Int32[np.ndarray, "H W"],
    predicted_classes: dict[int, int],
    ground_truth_map: Int32[np.ndarray, "H W"],
    ground_truth_classes: dict[int, int],
    crowds: frozenset[int] = frozenset(),
) -> OverlapMatrix:
    """Count shared pixels. The dictionaries map segment ids to classes; ids that are not listed count as void.

    Counts runs of pixels that are constant in both maps instead of single pixels: there are about 30 times fewer.
    """
    first, second = predicted_map.ravel(), ground_truth_map.ravel()
    starts = np.flatnonzero((first[1:] != first[:-1]) | (second[1:] != second[:-1])) + 1
    starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=first.size)
    rows = ids_to_positions(first[starts], predicted_classes)
    columns = ids_to_positions(second[starts], ground_truth_classes)
    width = len(ground_truth_classes) + 1
    counts = np.bincount(rows * width + columns, weights=lengths, minlength=(len(predicted_classes) + 1) * width)
    return OverlapMatrix(
        pixels=counts.astype(np.int64).reshape(len(predicted_classes) + 1, width),  # exact below 2**53 pixels
        predicted=np.array(list(predicted_classes.values()), np.int64),
        ground_truth=np.array(list(ground_truth_classes.values()), np.int64),
        is_crowd=np.array([segment in crowds for segment in ground_truth_classes], bool),
    )


def merge_ground_truth_stuff(overlap: OverlapMatrix, num_things: int) -> OverlapMatrix:
    """Merge the ground-truth stuff segments of each category, as predicted stuff is one segment per category."""
    pixels, first = _merge_stuff(overlap.pixels.T, overlap.ground_truth, num_things)
    return replace(overlap, pixels=pixels.T, ground_truth=overlap.ground_truth[first], is_crowd=overlap.is_crowd[first])


def map_predicted(overlap: OverlapMatrix, categories: Int[np.ndarray, "P"], num_things: int) -> OverlapMatrix:
    """Give each predicted segment its category, -1 for none; stuff segments of one category become one."""
    pixels, first = _merge_stuff(overlap.pixels, categories, num_things)
    return replace(overlap, pixels=pixels, predicted=categories[first], embeddings=None)


def _merge_stuff(
    pixels: Int[np.ndarray, "M+1 N"], categories: Int[np.ndarray, "M"], num_things: int
) -> tuple[Int[np.ndarray, "K+1 N"], Int[np.ndarray, "K"]]:
    """Sum the rows of the stuff segments of each category; returns the first segment of each new row, too."""
    positions = np.arange(len(categories))
    keys = np.where(categories < num_things, positions - len(categories), categories)
    _, first, rows = np.unique(keys, return_index=True, return_inverse=True)
    merged = np.zeros((len(first) + 1, pixels.shape[1]), pixels.dtype)
    np.add.at(merged, [0, *(rows + 1)], pixels)
    return merged, first


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
