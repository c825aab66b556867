"""How two label maps of one picture lie on each other: all that semantic and panoptic scores need to know."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Pixels shared by each predicted and each true segment; row 0 and column 0 are void."""

    pixels: Int[np.ndarray, "P+1 T+1"]
    predicted: Int[np.ndarray, "P"]
    """Class of each predicted segment (a cluster, or a category once matched); -1 has none."""
    true: Int[np.ndarray, "T"]
    """Category of each true segment."""
    is_crowd: Bool[np.ndarray, "T"]


def measure_overlap(
    predicted_map: Int32[np.ndarray, "H W"],
    predicted: dict[int, int],
    true_map: Int32[np.ndarray, "H W"],
    true: dict[int, int],
    crowds: frozenset[int] = frozenset(),
) -> Overlap:
    """Count shared pixels. The dictionaries give segment id to class; ids that they lack count as void."""
    rows, columns = (_number(each_map, ids) for each_map, ids in ((predicted_map, predicted), (true_map, true)))
    width = len(true) + 1
    counts = np.bincount((rows * width + columns).ravel(), minlength=(len(predicted) + 1) * width)
    return Overlap(
        pixels=counts.reshape(len(predicted) + 1, width),
        predicted=np.array(list(predicted.values()), np.int64),
        true=np.array(list(true.values()), np.int64),
        is_crowd=np.array([each in crowds for each in true], bool),
    )


def merge_true_stuff(overlap: Overlap, things: int) -> Overlap:
    """One true segment a stuff category (those from `things` on), as one predicted segment is."""
    keys = [(category, -1) if category >= things else (category, place) for place, category in enumerate(overlap.true)]
    kept = list(dict.fromkeys(keys))
    rows = [kept.index(key) + 1 for key in keys]
    crowds = [overlap.is_crowd[keys.index(key)] for key in kept]
    return Overlap(
        pixels=_sum_rows(overlap.pixels.T, rows, len(kept)).T,
        predicted=overlap.predicted,
        true=np.array([category for category, _ in kept], np.int64),
        is_crowd=np.array(crowds, bool),
    )


def rename_predicted(overlap: Overlap, table: Int[np.ndarray, "N"], merged_from: int) -> Overlap:
    """The predicted classes looked up in `table`; segments with no class become void.

    Segments of one category from `merged_from` on (stuff) become one segment.
    """
    renamed = table[overlap.predicted]
    keys = [(int(c), -1) if c >= merged_from else (int(c), place) for place, c in enumerate(renamed)]
    kept = list(dict.fromkeys(key for key in keys if key[0] >= 0))
    rows = [kept.index(key) + 1 if key[0] >= 0 else 0 for key in keys]
    pixels = _sum_rows(overlap.pixels, rows, len(kept))
    predicted = np.array([category for category, _ in kept], np.int64)
    return Overlap(pixels=pixels, predicted=predicted, true=overlap.true, is_crowd=overlap.is_crowd)


def _sum_rows(pixels: Int[np.ndarray, "M+1 N"], rows: list[int], count: int) -> Int[np.ndarray, "K+1 N"]:
    """Each segment's row added to the one that `rows` names (0 is void); void stays void."""
    summed = np.zeros((count + 1, pixels.shape[1]), pixels.dtype)
    np.add.at(summed, [0, *rows], pixels)
    return summed


def _number(label_map: Int32[np.ndarray, "H W"], ids: dict[int, int]) -> Int[np.ndarray, "H W"]:
    """Segment ids as places in `ids`, from 1; ids that it lacks are 0."""
    known = np.array(sorted(ids), np.int64)
    places = np.array([list(ids).index(each) + 1 for each in known.tolist()], np.int64)
    if not len(known):
        return np.zeros(label_map.shape, np.int64)
    nearest = np.searchsorted(known, label_map).clip(max=len(known) - 1)
    return np.where(known[nearest] == label_map, places[nearest], 0)
