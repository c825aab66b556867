"""Masks as polygons along pixel edges, with holes."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Int32, Int64

from model.postprocessing.masks import mask_iou

MIN_IOU = 0.98
"""Minimum IoU between a mask and its polygons, rasterized."""
_TOLERANCES_PX = (0.75, 0.4, 0.0)
"""Maximum distances of a simplified ring from the border; the first that reaches `MIN_IOU` is used."""
_FALLING, _RISING = 9, 6
"""Two set pixels that touch at a corner only: upper left and lower right, or upper right and lower left."""
_IS_CORNER = np.isin(np.arange(256), (1, 2, 4, 7, 8, 11, 13, 14, _FALLING, _RISING)).view(np.uint8)
"""By the set pixels around a point: 1 for upper left, 2 for upper right, 4 for lower left, 8 for lower right."""

Ring = Int32[np.ndarray, "P 2"]
"""Closed: the last point equals the first. x and y of pixel corners, from the upper left of the image."""


@dataclass(frozen=True, kw_only=True)
class Polygon:
    """A connected component of a mask; pixels that touch at a corner only are not connected."""

    outer: Ring
    """Clockwise on the screen."""
    holes: tuple[Ring, ...]
    """Counterclockwise on the screen."""

    def to_coco(self) -> list[int]:
        """Return x and y of all points as one ring, as COCO has no holes.

        A line of no width, there and back, joins each hole at its nearest point.
        """
        ring = self.outer[:-1]
        for hole in self.holes:
            distances = np.square(ring[:, None].astype(np.int64) - hole[:-1]).sum(-1)
            start, nearest = np.unravel_index(distances.argmin(), distances.shape)
            turned = np.roll(hole[:-1], -int(nearest), axis=0)
            ring = np.concatenate([ring[: start + 1], turned, turned[:1], ring[start:]])
        points: list[int] = ring.ravel().tolist()
        return points


def mask_to_polygons(bits: Bool[np.ndarray, "h w"], *, top: int = 0, left: int = 0) -> list[Polygon]:
    """Return the components of a mask at `top` and `left`, largest first, with as few points as `MIN_IOU` allows.

    Some readers of COCO's polygons take the first one only.
    """
    _, components = cv2.connectedComponents(bits.view(np.uint8), connectivity=4)
    exact = _trace_rings(bits)
    for tolerance_px in _TOLERANCES_PX:
        rings = [_simplify(ring, tolerance_px) for ring in exact]
        if not tolerance_px or mask_iou(rasterize(rings, *bits.shape), bits) >= MIN_IOU:
            break
    outers: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for corners, ring in zip(exact, rings, strict=True):
        x, y = corners[0].tolist()  # the uppermost leftmost corner: upper left of the first pixel, or of a hole's
        closed = np.concatenate([ring, ring[:1]]) + np.array([left, top], np.int32)
        if bits[y, x]:
            outers[int(components[y, x])] = closed
        else:
            holes.setdefault(int(components[y - 1, x]), []).append(closed[::-1].copy())
    polygons = [Polygon(outer=outer, holes=tuple(holes.get(component, ()))) for component, outer in outers.items()]
    return sorted(polygons, key=lambda polygon: cv2.contourArea(polygon.outer), reverse=True)


def rasterize(rings: list[Ring], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Return the pixels whose centers are inside an odd number of rings."""
    starts = np.concatenate(rings or [np.zeros((0, 2), np.int32)]).astype(np.float64)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings] or [np.zeros((0, 2), np.int32)])
    first = np.minimum(starts[:, 1], ends[:, 1]).astype(np.int64)  # the center of row y is half a pixel below line y
    counts = np.abs(ends[:, 1] - starts[:, 1]).astype(np.int64)
    edges = np.repeat(np.arange(len(starts)), counts)
    rows = first[edges] + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    rise = ends[edges, 1] - starts[edges, 1]
    crossings = starts[edges, 0] + (rows + 0.5 - starts[edges, 1]) * (ends[edges, 0] - starts[edges, 0]) / rise
    columns = np.ceil(crossings - 0.5).astype(np.int64)
    turns = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1)).astype(np.uint8)
    return (np.cumsum(turns.reshape(height, width + 1), axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)


def _simplify(ring: Ring, tolerance_px: float) -> Ring:
    """Simplify a ring by the Douglas-Peucker algorithm, unless that leaves no area."""
    if not tolerance_px:
        return ring
    simple: Ring = cv2.approxPolyDP(ring, tolerance_px, True)[:, 0]
    return simple if len(simple) > 2 else ring


def _trace_rings(bits: Bool[np.ndarray, "h w"]) -> list[Ring]:
    """Return the corners of each border in order, starting to the right from its uppermost leftmost corner.

    Along a row, and along a column, corners alternately start and end a piece of border, so that each corner has one
    neighbor in either direction. Where two set pixels touch at a corner only, there are two corners, one per pixel.
    """
    x, y, tie = _list_corners(bits)
    by_column = np.lexsort((tie, y, x))
    vertical = np.empty(len(x), np.int64)
    vertical[by_column[0::2]], vertical[by_column[1::2]] = by_column[1::2], by_column[0::2]
    vertical_neighbor = vertical.tolist()
    points = np.stack([x, y], axis=1).astype(np.int32)
    is_left = bytearray(b"\1") * len(vertical_neighbor)
    rings = []
    for start in range(len(vertical_neighbor)):
        if not is_left[start]:
            continue
        ring, corner = [], start
        while is_left[corner]:
            horizontal_neighbor = corner ^ 1
            ring += [corner, horizontal_neighbor]
            is_left[corner] = is_left[horizontal_neighbor] = 0
            corner = vertical_neighbor[horizontal_neighbor]
        rings.append(points[ring])
    return rings


def _list_corners(
    bits: Bool[np.ndarray, "h w"],
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
    """Return x and y of all corners in row order, and the order in their column of two at the same point."""
    padded = np.pad(bits.view(np.uint8), 1)
    kinds = padded[:-1, :-1] + 2 * padded[:-1, 1:] + 4 * padded[1:, :-1] + 8 * padded[1:, 1:]
    y, x = np.nonzero(cv2.LUT(kinds, _IS_CORNER))
    kinds = kinds[y, x]
    times = np.where((kinds == _FALLING) | (kinds == _RISING), 2, 1)
    firsts = np.repeat(np.cumsum(times) - times, times)
    second = np.arange(len(firsts)) - firsts
    return np.repeat(x, times), np.repeat(y, times), np.where(np.repeat(kinds, times) == _RISING, 1 - second, second)
