"""COCO's compressed run lengths, written for all segments of a map at once."""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import Bool, Int64, Shaped
from pycocotools import mask as coco

_DIGIT_BITS = 5
_MORE = 32
_SIGN = 16
_FIRST_CHARACTER = 48
_MAX_DIGITS = 7
"""32 bits, five at a time."""


@dataclass(frozen=True, kw_only=True)
class Rle:
    """A mask in COCO's terms, in the picture's own size."""

    size: tuple[int, int]
    """Height, width."""
    counts: str
    """Compressed COCO RLE, column-major."""
    area: int
    bbox: tuple[int, int, int, int]
    """x, y, width, height."""


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs of set pixels in column-major order, those of one mask after those of another."""

    starts: Int64[np.ndarray, "R"]
    ends: Int64[np.ndarray, "R"]
    bounds: Int64[np.ndarray, "N+1"]
    """Where the runs of each mask begin."""


def encode_label_map(labels: Shaped[np.ndarray, "H W"], ids: list[int]) -> list[Rle]:
    """The outline of each id's pixels, byte for byte as pycocotools', from one pass over the map; no id is negative."""
    if not ids:
        return []
    column_major = _narrow(labels)
    starts = np.concatenate([[0], np.flatnonzero(column_major[1:] != column_major[:-1]) + 1])
    ends = np.append(starts[1:], column_major.size)
    values = column_major[starts]
    order = np.argsort(values, kind="stable")
    first, last = np.searchsorted(values[order], [ids, [each + 1 for each in ids]])
    chosen = np.concatenate([order[begin:end] for begin, end in zip(first, last, strict=True)])
    bounds = np.concatenate([[0], np.cumsum(last - first)])
    return _make_rles(_Runs(starts=starts[chosen], ends=ends[chosen], bounds=bounds), labels.shape)


def encode_mask(bits: Bool[np.ndarray, "h w"], top: int, left: int, size: tuple[int, ...]) -> Rle:
    """The outline of a mask that lies at `top` and `left` in a picture of that size."""
    height, width = bits.shape
    columns = np.zeros((width, height + 2), np.uint8)  # unset pixels between the columns end every run with its column
    columns[:, 1:-1] = cv2.transpose(bits.view(np.uint8))
    flat = columns.ravel()
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    positions = (left + turns // (height + 2)) * size[0] + top + turns % (height + 2) - 1
    starts, ends = positions[::2], positions[1::2]
    touches = np.flatnonzero(starts[1:] == ends[:-1])  # from the foot of a column to the head of the next
    starts, ends = np.delete(starts, touches + 1), np.delete(ends, touches)
    (outline,) = _make_rles(_Runs(starts=starts, ends=ends, bounds=np.array([0, len(starts)])), size)
    return outline


def decode_rle(outline: Rle) -> Bool[np.ndarray, "H W"]:
    """The mask again."""
    bits: Bool[np.ndarray, "H W"] = coco.decode({"size": list(outline.size), "counts": outline.counts}).astype(bool)
    return bits


def _narrow(labels: Shaped[np.ndarray, "H W"]) -> Shaped[np.ndarray, "HW"]:
    """The map column by column, in bytes if its labels are small: a quarter of the memory to walk."""
    if labels.dtype.itemsize > 1 and labels.max() < 256:
        labels = labels.astype(np.uint8)
    return np.asarray(cv2.transpose(labels)).ravel()


def _make_rles(runs: _Runs, size: tuple[int, ...]) -> list[Rle]:
    height, width = size[0], size[1]
    areas = np.diff(np.concatenate([[0], np.cumsum(runs.ends - runs.starts)])[runs.bounds]).tolist()
    texts, boxes = _compress_counts(runs, height * width), _bounding_boxes(runs, height)
    return [
        Rle(size=(height, width), counts=text, area=area, bbox=(left, top, right - left, bottom - top))
        for text, area, (left, top, right, bottom) in zip(texts, areas, boxes.tolist(), strict=True)
    ]


def _bounding_boxes(runs: _Runs, height: int) -> Int64[np.ndarray, "N 4"]:
    """Left, top, right and bottom of each mask, the last two one further; zeros for one without a pixel."""
    has_pixels = np.diff(runs.bounds) > 0
    boxes = np.zeros((len(has_pixels), 4), np.int64)
    if not has_pixels.any():
        return boxes
    firsts = runs.bounds[:-1][has_pixels]
    lefts, tops = np.divmod(runs.starts, height)
    rights, bottoms = np.divmod(runs.ends - 1, height)
    spans = lefts != rights  # over the foot of a column
    tops, bottoms = np.where(spans, 0, tops), np.where(spans, height - 1, bottoms)
    sides = (lefts[firsts], np.minimum.reduceat(tops, firsts), np.maximum.reduceat(rights, firsts) + 1)
    boxes[has_pixels] = np.stack([*sides, np.maximum.reduceat(bottoms, firsts) + 1], axis=1)
    return boxes


def _compress_counts(runs: _Runs, pixels: int) -> list[str]:
    """COCO's text of each mask: run lengths from unset ones on, each from the fourth on less the one two before.

    Five bits a character, lowest first (maskApi.c of cocoapi, `rleToString`).
    """
    lengths, bounds = _run_lengths(runs, pixels)
    differences = lengths.copy()
    differences[2:] -= lengths[:-2]
    heads = (bounds[:-1, None] + np.arange(3)).ravel()  # the first three of each mask stand as they are
    heads = heads[heads < np.repeat(bounds[1:], 3)]
    differences[heads] = lengths[heads]
    digits = np.zeros((len(differences), _MAX_DIGITS), np.uint8)
    is_written = np.zeros(digits.shape, bool)
    rest, goes_on = differences, np.ones(len(differences), bool)
    for place in range(_MAX_DIGITS):
        digit = rest & (_MORE - 1)
        rest = rest >> _DIGIT_BITS
        is_written[:, place] = goes_on
        goes_on = goes_on & (rest != np.where(digit & _SIGN, -1, 0))
        digits[:, place] = digit + _MORE * goes_on + _FIRST_CHARACTER
        if not goes_on.any():
            break
    text = digits[is_written].tobytes().decode("ascii")
    ends = np.concatenate([[0], np.cumsum(is_written.sum(1))])[bounds].tolist()
    return [text[first:last] for first, last in pairwise(ends)]


def _run_lengths(runs: _Runs, pixels: int) -> tuple[Int64[np.ndarray, "L"], Int64[np.ndarray, "N+1"]]:
    """The lengths of unset and set runs in turn, for all masks, and where those of each mask begin."""
    masks = np.arange(len(runs.bounds) - 1)
    first, last = runs.bounds[:-1], runs.bounds[1:]
    before = np.concatenate([[0], runs.ends])  # where the run before each one ends
    before[first] = 0
    ends = np.where(last > first, np.concatenate([[0], runs.ends])[last], 0)
    places = 2 * np.arange(len(runs.starts)) + np.repeat(masks, last - first)
    lengths = np.empty(2 * len(runs.starts) + len(masks), np.int64)
    lengths[places], lengths[places + 1] = runs.starts - before[:-1], runs.ends - runs.starts
    tails = 2 * last + masks
    lengths[tails] = pixels - ends
    is_kept = np.ones(len(lengths), bool)
    is_kept[tails] = ends < pixels
    bounds: Int64[np.ndarray, "N+1"] = np.concatenate([[0], np.cumsum(is_kept)[tails]])
    return lengths[is_kept], bounds
