"""How two label maps of one picture lie on each other: all that semantic and panoptic scores need to know."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32


@dataclass(frozen=True, kw_only=True)
class OverlapMatrix:
    """Pixels shared by each predicted and each true segment; row 0 and column 0 are void."""

    pixels: Int[np.ndarray, "P+1 T+1"]
    predicted: Int[np.ndarray, "P"]
    """Class of each predicted segment (a cluster, or a category once matched); -1 has none."""
    true: Int[np.ndarray, "T"]
    """Category of each true segment."""
    is_crowd: Bool[np.ndarray, "T"]


def compute_overlap(
    predicted_map: Int32[np.ndarray, "H W"],
    predicted: dict[int, int],
    true_map: Int32[np.ndarray, "H W"],
    true: dict[int, int],
    crowds: frozenset[int] = frozenset(),
) -> OverlapMatrix:
    """Count shared pixels. The dictionaries give segment id to class; ids that they lack count as void.

    Runs of pixels that are alike in both maps are counted and not single pixels: there are about 30 times fewer.
    """
    first, second = predicted_map.ravel(), true_map.ravel()
    starts = np.flatnonzero((first[1:] != first[:-1]) | (second[1:] != second[:-1])) + 1
    starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=first.size)
    rows, columns = _number(first[starts], predicted), _number(second[starts], true)
    width = len(true) + 1
    counts = np.bincount(rows * width + columns, weights=lengths, minlength=(len(predicted) + 1) * width)
    return OverlapMatrix(
        pixels=counts.astype(np.int64).reshape(len(predicted) + 1, width),  # exact: far fewer than 2**53 pixels
        predicted=np.array(list(predicted.values()), np.int64),
        true=np.array(list(true.values()), np.int64),
        is_crowd=np.array([each in crowds for each in true], bool),
    )


def merge_ground_truth_stuff(overlap: OverlapMatrix, things: int) -> OverlapMatrix:
    """One true segment a stuff category (those from `things` on), as one predicted segment is."""
    keys = [(category, -1) if category >= things else (category, place) for place, category in enumerate(overlap.true)]
    kept = list(dict.fromkeys(keys))
    rows = [kept.index(key) + 1 for key in keys]
    crowds = [overlap.is_crowd[keys.index(key)] for key in kept]
    return OverlapMatrix(
        pixels=_sum_rows(overlap.pixels.T, rows, len(kept)).T,
        predicted=overlap.predicted,
        true=np.array([category for category, _ in kept], np.int64),
        is_crowd=np.array(crowds, bool),
    )


def map_predicted(overlap: OverlapMatrix, table: Int[np.ndarray, "N"], merged_from: int) -> OverlapMatrix:
    """The predicted classes looked up in `table`; segments with no class become void.

    Segments of one category from `merged_from` on (stuff) become one segment.
    """
    renamed = table[overlap.predicted]
    keys = [(int(c), -1) if c >= merged_from else (int(c), place) for place, c in enumerate(renamed)]
    kept = list(dict.fromkeys(key for key in keys if key[0] >= 0))
    rows = [kept.index(key) + 1 if key[0] >= 0 else 0 for key in keys]
    pixels = _sum_rows(overlap.pixels, rows, len(kept))
    predicted = np.array([category for category, _ in kept], np.int64)
    return OverlapMatrix(pixels=pixels, predicted=predicted, true=overlap.true, is_crowd=overlap.is_crowd)


def merge_things(overlap: OverlapMatrix, things: int) -> OverlapMatrix:
    """Things of every kind as class 0, the stuff categories above it, on both sides: U2Seg's 16 classes of COCO."""
    return OverlapMatrix(
        pixels=overlap.pixels,
        predicted=np.maximum(overlap.predicted - things + 1, 0),
        true=np.maximum(overlap.true - things + 1, 0),
        is_crowd=overlap.is_crowd,
    )


def _sum_rows(pixels: Int[np.ndarray, "M+1 N"], rows: list[int], count: int) -> Int[np.ndarray, "K+1 N"]:
    """Each segment's row added to the one that `rows` names (0 is void); void stays void."""
    summed = np.zeros((count + 1, pixels.shape[1]), pixels.dtype)
    np.add.at(summed, [0, *rows], pixels)
    return summed


def _number(ids: Int32[np.ndarray, "R"], known: dict[int, int]) -> Int[np.ndarray, "R"]:
    """Segment ids as places in `known`, from 1; ids that it lacks are 0."""
    if not known:
        return np.zeros(len(ids), np.int64)
    keys = np.array(list(known), np.int64)
    order = np.argsort(keys)
    nearest = order[np.searchsorted(keys, ids, sorter=order).clip(max=len(keys) - 1)]
    return np.where(keys[nearest] == ids, nearest + 1, 0)
