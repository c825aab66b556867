"""Bilinear upsampling of score maps to per-pixel decisions, interpolating only where the decision changes.

The pixels between four neighboring cell centers form a block, and these cells are its corners. A bilinear map stays
between the values of the corners: where all four lead to the same decision, so do all pixels of the block. The other
blocks lie along borders, about a tenth of an image. The result is that of interpolating the whole map
(`model.images.resize_map`), except for rounding in ties. Measured at 2.5 megapixels: argmax takes 3 ms instead of 20.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Intervals between cell centers along one axis; the first and the last one reach beyond the border."""

    starts: Int[np.ndarray, "intervals+1"]
    """First pixel of each interval, and the end of the last one."""
    weights: Float32[np.ndarray, "pixels"]
    """Weight of the later of the two cells around each pixel, 0..1."""

    @property
    def lengths(self) -> Int[np.ndarray, "intervals"]:
        """Pixels per interval; some are 0 if the map is larger than the image."""
        return np.diff(self.starts)

    def list_pixels(self, intervals: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K n"]:
        """Return the pixels of each interval; shorter ones repeat their last pixel."""
        steps = np.minimum(np.arange(self.lengths.max()), self.lengths[intervals, None] - 1)
        pixels: Int[np.ndarray, "K n"] = self.starts[intervals, None] + steps
        return pixels


@dataclass(frozen=True, kw_only=True)
class MaskPatch:
    """A binary mask in a part of an image; it is empty elsewhere."""

    top: int
    left: int
    bits: Bool[np.ndarray, "h w"]


class BilinearUpsampler:
    """Upsamples maps of `cells` (rows, columns) to `pixels` (height, width)."""

    def __init__(self, cells: tuple[int, int], pixels: tuple[int, int]) -> None:
        self._pixels = pixels
        self._rows, self._columns = (_make_axis(*lengths) for lengths in zip(cells, pixels, strict=True))
        self._has_pixels = (self._rows.lengths[:, None] > 0) & (self._columns.lengths > 0)

    def threshold(self, maps: Float[np.ndarray, "N h w"], threshold: float) -> Iterator[MaskPatch | None]:
        """Yield the pixels of each map above the threshold, in a patch that may be slightly too large; None if none."""
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
        corners = _take_corners(padded > threshold)
        blocks = np.logical_or.reduce(corners) & self._has_pixels
        is_uniform = np.logical_and.reduce(corners)
        index, i, j = np.nonzero(blocks & ~is_uniform)
        y, x = self._rows.list_pixels(i), self._columns.list_pixels(j)
        values = self._interpolate(_list_corners(padded, index, i, j), y, x) > threshold
        bounds = np.searchsorted(index, np.arange(len(maps) + 1))
        tops, bottoms = _find_bounds(blocks.any(2))
        lefts, rights = _find_bounds(blocks.any(1))
        for n, (first, last) in enumerate(pairwise(bounds)):
            rows, columns = slice(tops[n], bottoms[n]), slice(lefts[n], rights[n])
            if rows.start == rows.stop:
                yield None
                continue
            top, left = int(self._rows.starts[rows.start]), int(self._columns.starts[columns.start])
            bits = self._fill_blocks(is_uniform[n], rows, columns)
            _write_blocks(bits, y[first:last] - top, x[first:last] - left, values[first:last])
            yield MaskPatch(top=top, left=left, bits=bits)

    def argmax(self, maps: Float[np.ndarray, "L h w"], labels: Shaped[np.ndarray, "L"]) -> Shaped[np.ndarray, "H W"]:
        """Return the label of the highest map at each pixel; in a tie, that of the first."""
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
        best = _take_corners(labels[padded.argmax(0)])
        is_uniform = (best == best[0]).all(0)
        winners = self._fill_blocks(best[0], slice(0, is_uniform.shape[0]), slice(0, is_uniform.shape[1]))
        i, j = np.nonzero(~is_uniform & self._has_pixels)
        if len(i):
            y, x = self._rows.list_pixels(i), self._columns.list_pixels(j)
            corners = _list_corners(padded, slice(None), i, j)
            _write_blocks(winners, y, x, self._argmax_blocks(corners, labels, y, x))
        return winners

    def _argmax_blocks(
        self,
        corners: Float[np.ndarray, "4 L K"],
        labels: Shaped[np.ndarray, "L"],
        y: Int[np.ndarray, "K n"],
        x: Int[np.ndarray, "K m"],
    ) -> Shaped[np.ndarray, "K n m"]:
        """Return the labels of the pixels of K blocks.

        A map whose highest corner is below the lowest corner of another cannot win. Most blocks have two candidates
        left, and the sign of their difference decides.
        """
        is_candidate = corners.max(0) >= corners.min(0).max(0)
        winners = np.empty((len(y), y.shape[1], x.shape[1]), labels.dtype)
        has_two = is_candidate.sum(0) == 2
        pairs, others = np.flatnonzero(has_two), np.flatnonzero(~has_two)
        first = is_candidate[:, pairs].argmax(0)
        second = len(labels) - 1 - is_candidate[::-1, pairs].argmax(0)
        lead = self._interpolate(corners[:, first, pairs] - corners[:, second, pairs], y[pairs], x[pairs])
        winners[pairs] = np.where(lead >= 0.0, labels[first, None, None], labels[second, None, None])
        winners[others] = self._argmax_many(
            corners[:, :, others], is_candidate[:, others], labels, y[others], x[others]
        )
        return winners

    def _argmax_many(
        self,
        corners: Float[np.ndarray, "4 L K"],
        is_candidate: Bool[np.ndarray, "L K"],
        labels: Shaped[np.ndarray, "L"],
        y: Int[np.ndarray, "K n"],
        x: Int[np.ndarray, "K m"],
    ) -> Shaped[np.ndarray, "K n m"]:
        """Return the labels of the pixels of K blocks with any number of candidates, compared one after another."""
        best = np.full((len(y), y.shape[1], x.shape[1]), -np.inf, np.float32)
        winners = np.zeros(best.shape, labels.dtype)
        for index in np.flatnonzero(is_candidate.any(1)):
            chosen = np.flatnonzero(is_candidate[index])
            values = self._interpolate(corners[:, index, chosen], y[chosen], x[chosen])
            previous = best[chosen]
            winners[chosen] = np.where(values > previous, labels[index], winners[chosen])
            best[chosen] = np.maximum(values, previous)
        return winners

    def _interpolate(
        self, corners: Float[np.ndarray, "4 K"], y: Int[np.ndarray, "K n"], x: Int[np.ndarray, "K m"]
    ) -> Float[np.ndarray, "K n m"]:
        """Return the values of the pixels of K blocks."""
        upper_left, upper_right, lower_left, lower_right = corners[:, :, None]
        across, down = self._columns.weights[x], self._rows.weights[y]
        upper = upper_left + (upper_right - upper_left) * across
        lower = lower_left + (lower_right - lower_left) * across
        values: Float[np.ndarray, "K n m"] = (lower - upper)[:, None, :] * down[:, :, None]
        values += upper[:, None, :]
        return values

    def _fill_blocks(self, values: Shaped[np.ndarray, "g k"], rows: slice, columns: slice) -> Shaped[np.ndarray, "n m"]:
        """Return an image in which all pixels of a block have its value."""
        wide = np.repeat(values[rows, columns], self._columns.lengths[columns], axis=1)
        return np.repeat(wide, self._rows.lengths[rows], axis=0)


def _make_axis(cells: int, pixels: int) -> _Axis:
    """Pixel centers lie at (y + 0.5) * cells / pixels - 0.5 between the cell centers 0..cells-1."""
    positions = (np.arange(pixels) + 0.5) * (cells / pixels) + 0.5  # shifted by one cell of padding
    intervals = np.minimum(positions.astype(np.intp), cells)
    starts = np.searchsorted(intervals, np.arange(cells + 2))
    return _Axis(starts=starts, weights=(positions - intervals).astype(np.float32))


def _take_corners(padded: Shaped[np.ndarray, "*N h+2 w+2"]) -> Shaped[np.ndarray, "4 *N h+1 w+1"]:
    """Return the corners of every block: upper left, upper right, lower left, lower right."""
    upper, lower = padded[..., :-1, :], padded[..., 1:, :]
    return np.stack([upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]])


def _list_corners(
    padded: Shaped[np.ndarray, "N h+2 w+2"],
    index: Int[np.ndarray, "K"] | slice,
    i: Int[np.ndarray, "K"],
    j: Int[np.ndarray, "K"],
) -> Shaped[np.ndarray, "4 *N K"]:
    """Return the corners of the K blocks at rows `i` and columns `j`."""
    return np.stack([padded[index, i + down, j + right] for down in (0, 1) for right in (0, 1)])


def _find_bounds(is_used: Bool[np.ndarray, "N n"]) -> tuple[list[int], list[int]]:
    """Return the first true index of each row and the one after its last; equal if none is true."""
    firsts, lasts = is_used.argmax(1), is_used.shape[1] - is_used[:, ::-1].argmax(1)
    return firsts.tolist(), np.where(is_used.any(1), lasts, firsts).tolist()


def _write_blocks(
    image: Shaped[np.ndarray, "H W"],
    y: Int[np.ndarray, "K n"],
    x: Int[np.ndarray, "K m"],
    values: Shaped[np.ndarray, "K n m"],
) -> None:
    """Write blocks into a contiguous image; a pixel that occurs twice has the same value twice."""
    flat = image.reshape(-1)
    flat[(y * image.shape[1])[:, :, None] + x[:, None, :]] = values
