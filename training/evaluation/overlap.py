"""Pixels shared by the segments of two label maps: all that semantic and panoptic metrics need."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from model.postprocessing.panoptic import ids_to_positions


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
