"""COCO's compressed run-length encoding, for all segments of a label map at once.

Byte for byte as pycocotools' encoding; at 2.5 megapixels with 30 segments 2 ms instead of 56.
"""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import Bool, Int64, Shaped
from pycocotools import mask as coco

_DIGIT_BITS = 5
_CONTINUES = 32
_SIGN = 16
_FIRST_CHARACTER = 48
_MAX_DIGITS = 7
"""For 32 bits, five at a time."""


@dataclass(frozen=True, kw_only=True)
class Rle:
    """A mask as COCO's RLE, in the size of the image."""

    size: tuple[int, int]
    """Height, width."""
    counts: str
    """Compressed RLE, column-major."""
    area: int
    bbox: tuple[int, int, int, int]
    """x, y, width, height."""


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs of set pixels in column-major order, mask after mask."""

    starts: Int64[np.ndarray, "R"]
    ends: Int64[np.ndarray, "R"]
    bounds: Int64[np.ndarray, "N+1"]
    """First run of each mask, and the number of all runs."""


def encode_label_map(labels: Shaped[np.ndarray, "H W"], ids: list[int]) -> list[Rle]:
    """Return the RLE of each id, which must not be negative."""
    if not ids:
        return []
    column_major = _flatten_columns(labels)
    starts = np.concatenate([[0], np.flatnonzero(column_major[1:] != column_major[:-1]) + 1])
    ends = np.append(starts[1:], column_major.size)
    values = column_major[starts]
    order = np.argsort(values, kind="stable")
    first, last = np.searchsorted(values[order], [ids, [each + 1 for each in ids]])
    chosen = np.concatenate([order[start:end] for start, end in zip(first, last, strict=True)])
    bounds = np.concatenate([[0], np.cumsum(last - first)])
    return _make_rles(_Runs(starts=starts[chosen], ends=ends[chosen], bounds=bounds), labels.shape)


def encode_mask(bits: Bool[np.ndarray, "h w"], top: int, left: int, size: tuple[int, ...]) -> Rle:
    """Return the RLE of a mask at `top` and `left` in an image of the given size (height, width)."""
    height, width = bits.shape
    columns = np.zeros((width, height + 2), np.uint8)  # unset pixels between columns end every run with its column
    columns[:, 1:-1] = cv2.transpose(bits.view(np.uint8))
    flat = columns.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    positions = (left + changes // (height + 2)) * size[0] + top + changes % (height + 2) - 1
    starts, ends = positions[::2], positions[1::2]
    continues = np.flatnonzero(starts[1:] == ends[:-1])  # from the end of a column to the start of the next
    starts, ends = np.delete(starts, continues + 1), np.delete(ends, continues)
    (rle,) = _make_rles(_Runs(starts=starts, ends=ends, bounds=np.array([0, len(starts)])), size)
    return rle


def decode_rle(rle: Rle) -> Bool[np.ndarray, "H W"]:
    bits: Bool[np.ndarray, "H W"] = coco.decode({"size": list(rle.size), "counts": rle.counts}).astype(bool)
    return bits


def parse_counts(text: str) -> Int64[np.ndarray, "L"]:
    """Return the run lengths of COCO's compressed RLE, unset runs first.

    pycocotools decodes a text that is too short or damaged without an error, or never ends. Raises ValueError for a
    character or an end that the format does not have; the sum of the runs is not checked.
    """
    digits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(digits) or digits.min() < 0 or digits.max() >= 2 * _CONTINUES or digits[-1] & _CONTINUES:
        raise ValueError("not a compressed RLE")
    ends = np.flatnonzero(digits < _CONTINUES)
    starts = np.append(0, ends[:-1] + 1)
    if (ends - starts).max() >= _MAX_DIGITS:
        raise ValueError("a run of the RLE is too long")
    shifts = _DIGIT_BITS * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    lengths = np.add.reduceat((digits & (_CONTINUES - 1)) << shifts, starts)
    lengths -= np.where(digits[ends] & _SIGN, 1 << (shifts[ends] + _DIGIT_BITS), 0)
    for first in (1, 2):  # from the fourth on, runs are stored as the difference to the one two before
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths


def _flatten_columns(labels: Shaped[np.ndarray, "H W"]) -> Shaped[np.ndarray, "HW"]:
    """Return the map in column-major order, as bytes if the labels allow it."""
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
    """Return left, top, right and bottom of each mask, the last two exclusive; zeros for an empty mask."""
    has_pixels = np.diff(runs.bounds) > 0
    boxes = np.zeros((len(has_pixels), 4), np.int64)
    if not has_pixels.any():
        return boxes
    firsts = runs.bounds[:-1][has_pixels]
    lefts, tops = np.divmod(runs.starts, height)
    rights, bottoms = np.divmod(runs.ends - 1, height)
    spans_columns = lefts != rights
    tops, bottoms = np.where(spans_columns, 0, tops), np.where(spans_columns, height - 1, bottoms)
    sides = (lefts[firsts], np.minimum.reduceat(tops, firsts), np.maximum.reduceat(rights, firsts) + 1)
    boxes[has_pixels] = np.stack([*sides, np.maximum.reduceat(bottoms, firsts) + 1], axis=1)
    return boxes


def _compress_counts(runs: _Runs, pixels: int) -> list[str]:
    """Return COCO's text for each mask: run lengths, from the fourth on as difference to the one two before.

    Five bits per character, lowest first (`rleToString` in cocoapi's maskApi.c).
    """
    lengths, bounds = _run_lengths(runs, pixels)
    differences = lengths.copy()
    differences[2:] -= lengths[:-2]
    heads = (bounds[:-1, None] + np.arange(3)).ravel()  # the first three of each mask are stored as they are
    heads = heads[heads < np.repeat(bounds[1:], 3)]
    differences[heads] = lengths[heads]
    digits = np.zeros((len(differences), _MAX_DIGITS), np.uint8)
    is_written = np.zeros(digits.shape, bool)
    rest, continues = differences, np.ones(len(differences), bool)
    for place in range(_MAX_DIGITS):
        digit = rest & (_CONTINUES - 1)
        rest = rest >> _DIGIT_BITS
        is_written[:, place] = continues
        continues = continues & (rest != np.where(digit & _SIGN, -1, 0))
        digits[:, place] = digit + _CONTINUES * continues + _FIRST_CHARACTER
        if not continues.any():
            break
    text = digits[is_written].tobytes().decode("ascii")
    ends = np.concatenate([[0], np.cumsum(is_written.sum(1))])[bounds].tolist()
    return [text[first:last] for first, last in pairwise(ends)]


def _run_lengths(runs: _Runs, pixels: int) -> tuple[Int64[np.ndarray, "L"], Int64[np.ndarray, "N+1"]]:
    """Return the lengths of unset and set runs in turn, for all masks, and the first one of each mask."""
    masks = np.arange(len(runs.bounds) - 1)
    first, last = runs.bounds[:-1], runs.bounds[1:]
    previous_end = np.concatenate([[0], runs.ends])
    previous_end[first] = 0
    ends = np.where(last > first, np.concatenate([[0], runs.ends])[last], 0)
    places = 2 * np.arange(len(runs.starts)) + np.repeat(masks, last - first)
    lengths = np.empty(2 * len(runs.starts) + len(masks), np.int64)
    lengths[places], lengths[places + 1] = runs.starts - previous_end[:-1], runs.ends - runs.starts
    tails = 2 * last + masks
    lengths[tails] = pixels - ends
    is_kept = np.ones(len(lengths), bool)
    is_kept[tails] = ends < pixels
    bounds: Int64[np.ndarray, "N+1"] = np.concatenate([[0], np.cumsum(is_kept)[tails]])
    return lengths[is_kept], bounds
