"""Masks as polygons: every part, with its holes, along the borders of pixels."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Int32, Int64

MIN_IOU = 0.98
"""What a mask drawn again from its polygons has in common with it, at least."""
_TOLERANCES_PX = (0.75, 0.4, 0.0)
"""How far a simplified ring may stray from the border; the next is taken where one costs too much of the mask."""
_FALLING, _RISING = 9, 6
"""Two set pixels that touch at a corner alone: upper left and lower right, or upper right and lower left."""
_IS_CORNER = np.isin(np.arange(256), (1, 2, 4, 7, 8, 11, 13, 14, _FALLING, _RISING)).view(np.uint8)
"""By which of the pixels around a point are set: 1 for the upper left, 2, 4 for the lower left, 8."""

Ring = Int32[np.ndarray, "P 2"]
"""Closed, the first point given again at the end; x and y of corners of pixels, counted from the upper left of all."""


@dataclass(frozen=True, kw_only=True)
class Polygon:
    """A connected part of a mask; pixels that touch at a corner alone are not connected."""

    outer: Ring
    """Clockwise as one sees it."""
    holes: tuple[Ring, ...]
    """Counterclockwise."""


def mask_to_polygons(bits: Bool[np.ndarray, "h w"], *, top: int = 0, left: int = 0) -> list[Polygon]:
    """The parts of a mask that begins at `top` and `left`, with as few points as `MIN_IOU` allows."""
    _, components = cv2.connectedComponents(bits.view(np.uint8), connectivity=4)
    exact = _trace_rings(bits)
    for tolerance_px in _TOLERANCES_PX:
        rings = [_simplify(ring, tolerance_px) for ring in exact]
        if not tolerance_px or _mask_iou(rasterize(rings, *bits.shape), bits) >= MIN_IOU:
            break
    outers: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for corners, ring in zip(exact, rings, strict=True):
        x, y = corners[0].tolist()  # the uppermost, of these the leftmost: it lies at its upper left, or a hole's
        closed = np.concatenate([ring, ring[:1]]) + np.array([left, top], np.int32)
        if bits[y, x]:
            outers[int(components[y, x])] = closed
        else:
            holes.setdefault(int(components[y - 1, x]), []).append(closed[::-1].copy())
    return [Polygon(outer=outer, holes=tuple(holes.get(part, ()))) for part, outer in outers.items()]


def rasterize(rings: list[Ring], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """The pixels whose centres an odd number of rings goes around."""
    starts = np.concatenate(rings or [np.zeros((0, 2), np.int32)]).astype(np.float64)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings] or [np.zeros((0, 2), np.int32)])
    first = np.minimum(starts[:, 1], ends[:, 1]).astype(np.int64)  # row y has its centre half a pixel below line y
    counts = np.abs(ends[:, 1] - starts[:, 1]).astype(np.int64)
    edges = np.repeat(np.arange(len(starts)), counts)
    rows = first[edges] + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    rise = ends[edges, 1] - starts[edges, 1]
    crossings = starts[edges, 0] + (rows + 0.5 - starts[edges, 1]) * (ends[edges, 0] - starts[edges, 0]) / rise
    columns = np.ceil(crossings - 0.5).astype(np.int64)
    turns = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1)).astype(np.uint8)
    return (np.cumsum(turns.reshape(height, width + 1), axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)


def _mask_iou(first: Bool[np.ndarray, "h w"], second: Bool[np.ndarray, "h w"]) -> float:
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / max(1, union)


def _simplify(ring: Ring, tolerance_px: float) -> Ring:
    """Douglas and Peucker's simplification, if it leaves an area."""
    if not tolerance_px:
        return ring
    simple: Ring = cv2.approxPolyDP(ring, tolerance_px, True)[:, 0]
    return simple if len(simple) > 2 else ring


def _trace_rings(bits: Bool[np.ndarray, "h w"]) -> list[Ring]:
    """Every border, as its corners in order, from the uppermost and of these the leftmost rightwards.

    In a row, and in a column, corners take turns at beginning and ending a piece of border; so each has one neighbour
    either way. Where two set pixels touch at a corner alone, there are two corners, one for each pixel.
    """
    x, y, tie = _list_corners(bits)
    by_column = np.lexsort((tie, y, x))
    above_or_below = np.empty(len(x), np.int64)
    above_or_below[by_column[0::2]], above_or_below[by_column[1::2]] = by_column[1::2], by_column[0::2]
    partner = above_or_below.tolist()
    points = np.stack([x, y], axis=1).astype(np.int32)
    is_left = bytearray(b"\1") * len(partner)
    rings = []
    for start in range(len(partner)):
        if not is_left[start]:
            continue
        ring, corner = [], start
        while is_left[corner]:
            beside = corner ^ 1
            ring += [corner, beside]
            is_left[corner] = is_left[beside] = 0
            corner = partner[beside]
        rings.append(points[ring])
    return rings


def _list_corners(
    bits: Bool[np.ndarray, "h w"],
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
    """x and y of all corners, row by row, and which of two at one point comes first in its column."""
    padded = np.pad(bits.view(np.uint8), 1)
    kinds = padded[:-1, :-1] + 2 * padded[:-1, 1:] + 4 * padded[1:, :-1] + 8 * padded[1:, 1:]
    y, x = np.nonzero(cv2.LUT(kinds, _IS_CORNER))
    kinds = kinds[y, x]
    times = np.where((kinds == _FALLING) | (kinds == _RISING), 2, 1)
    firsts = np.repeat(np.cumsum(times) - times, times)
    second = np.arange(len(firsts)) - firsts
    return np.repeat(x, times), np.repeat(y, times), np.where(np.repeat(kinds, times) == _RISING, 1 - second, second)
