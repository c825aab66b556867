"""What soft maps of a few cells decide for each pixel, interpolated only where the decision changes.

Between four neighbouring cell centres a bilinear map stays between its four corners: where they all decide alike, so
does every pixel. What is left runs along the borders, a tenth of a picture. The pixels get what they would get from
the whole map in the picture's own size (`model.images.resize_map`), but for the rounding of a tie.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The gaps between cell centres along one axis; the first and the last reach over the border."""

    starts: Int[np.ndarray, "gaps+1"]
    """The first pixel of each gap, and the end of the last."""
    weights: Float32[np.ndarray, "pixels"]
    """Of the later of the two cells around each pixel, 0..1."""

    @property
    def lengths(self) -> Int[np.ndarray, "gaps"]:
        """Pixels in each gap; none in some where the map is shrunk."""
        return np.diff(self.starts)

    def list_pixels(self, gaps: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K n"]:
        """The pixels of each gap, the last one repeated in those that are shorter than the longest."""
        steps = np.minimum(np.arange(self.lengths.max()), self.lengths[gaps, None] - 1)
        pixels: Int[np.ndarray, "K n"] = self.starts[gaps, None] + steps
        return pixels


@dataclass(frozen=True, kw_only=True)
class MaskPatch:
    """A part of a picture."""

    top: int
    left: int
    bits: Bool[np.ndarray, "h w"]


class BilinearUpsampler:
    """The way from `cells` (rows, columns) to `pixels` (height, width)."""

    def __init__(self, cells: tuple[int, int], pixels: tuple[int, int]) -> None:
        self._pixels = pixels
        self._rows, self._columns = (_make_axis(*lengths) for lengths in zip(cells, pixels, strict=True))
        self._has_pixels = (self._rows.lengths[:, None] > 0) & (self._columns.lengths > 0)

    def threshold(self, stack: Float[np.ndarray, "N h w"], limit: float) -> Iterator[MaskPatch | None]:
        """For each map the pixels above `limit`, in a cut around them that may be a little too large; None if none."""
        padded = np.pad(stack, ((0, 0), (1, 1), (1, 1)), mode="edge")
        corners = _take_corners(padded > limit)
        gaps = np.logical_or.reduce(corners) & self._has_pixels
        is_sure = np.logical_and.reduce(corners)
        number, i, j = np.nonzero(gaps & ~is_sure)
        y, x = self._rows.list_pixels(i), self._columns.list_pixels(j)
        values = self._interpolate(_list_corners(padded, number, i, j), y, x) > limit
        bounds = np.searchsorted(number, np.arange(len(stack) + 1))
        tops, bottoms = _find_bounds(gaps.any(2))
        lefts, rights = _find_bounds(gaps.any(1))
        for place, (first, last) in enumerate(pairwise(bounds)):
            rows, columns = slice(tops[place], bottoms[place]), slice(lefts[place], rights[place])
            if rows.start == rows.stop:
                yield None
                continue
            top, left = int(self._rows.starts[rows.start]), int(self._columns.starts[columns.start])
            bits = self._spread(is_sure[place], rows, columns)
            _write_blocks(bits, y[first:last] - top, x[first:last] - left, values[first:last])
            yield MaskPatch(top=top, left=left, bits=bits)

    def argmax(self, fields: Float[np.ndarray, "L h w"], names: Shaped[np.ndarray, "L"]) -> Shaped[np.ndarray, "H W"]:
        """The name of the field that is highest at each pixel, among equals of the first."""
        padded = np.pad(fields, ((0, 0), (1, 1), (1, 1)), mode="edge")
        best = _take_corners(names[padded.argmax(0)])
        is_sure = (best == best[0]).all(0)
        winners = self._spread(best[0], slice(0, is_sure.shape[0]), slice(0, is_sure.shape[1]))
        i, j = np.nonzero(~is_sure & self._has_pixels)
        if len(i):
            y, x = self._rows.list_pixels(i), self._columns.list_pixels(j)
            corners = _list_corners(padded, slice(None), i, j)
            _write_blocks(winners, y, x, self._compete(corners, names, y, x))
        return winners

    def _compete(
        self,
        corners: Float[np.ndarray, "4 L K"],
        names: Shaped[np.ndarray, "L"],
        y: Int[np.ndarray, "K n"],
        x: Int[np.ndarray, "K m"],
    ) -> Shaped[np.ndarray, "K n m"]:
        """The winners of gaps; a field that nowhere reaches another's lowest corner need not compete.

        In most gaps two are left, and the sign of their difference decides.
        """
        is_candidate = corners.max(0) >= corners.min(0).max(0)
        winners = np.empty((len(y), y.shape[1], x.shape[1]), names.dtype)
        is_duel = is_candidate.sum(0) == 2
        duels, others = np.flatnonzero(is_duel), np.flatnonzero(~is_duel)
        first = is_candidate[:, duels].argmax(0)
        second = len(names) - 1 - is_candidate[::-1, duels].argmax(0)
        lead = self._interpolate(corners[:, first, duels] - corners[:, second, duels], y[duels], x[duels])
        winners[duels] = np.where(lead >= 0.0, names[first, None, None], names[second, None, None])
        winners[others] = self._compete_at_length(
            corners[:, :, others], is_candidate[:, others], names, y[others], x[others]
        )
        return winners

    def _compete_at_length(
        self,
        corners: Float[np.ndarray, "4 L K"],
        is_candidate: Bool[np.ndarray, "L K"],
        names: Shaped[np.ndarray, "L"],
        y: Int[np.ndarray, "K n"],
        x: Int[np.ndarray, "K m"],
    ) -> Shaped[np.ndarray, "K n m"]:
        """The same, one candidate after another."""
        best = np.full((len(y), y.shape[1], x.shape[1]), -np.inf, np.float32)
        winners = np.zeros(best.shape, names.dtype)
        for label in np.flatnonzero(is_candidate.any(1)):
            chosen = np.flatnonzero(is_candidate[label])
            values = self._interpolate(corners[:, label, chosen], y[chosen], x[chosen])
            known = best[chosen]
            winners[chosen] = np.where(values > known, names[label], winners[chosen])
            best[chosen] = np.maximum(values, known)
        return winners

    def _interpolate(
        self, corners: Float[np.ndarray, "4 K"], y: Int[np.ndarray, "K n"], x: Int[np.ndarray, "K m"]
    ) -> Float[np.ndarray, "K n m"]:
        """The values at the pixels of gaps with these corners."""
        upper_left, upper_right, lower_left, lower_right = corners[:, :, None]
        across, down = self._columns.weights[x], self._rows.weights[y]
        upper = upper_left + (upper_right - upper_left) * across
        lower = lower_left + (lower_right - lower_left) * across
        values: Float[np.ndarray, "K n m"] = (lower - upper)[:, None, :] * down[:, :, None]
        values += upper[:, None, :]
        return values

    def _spread(self, gaps: Shaped[np.ndarray, "g k"], rows: slice, columns: slice) -> Shaped[np.ndarray, "n m"]:
        """One value a gap, on all its pixels."""
        wide = np.repeat(gaps[rows, columns], self._columns.lengths[columns], axis=1)
        return np.repeat(wide, self._rows.lengths[rows], axis=0)


def _make_axis(cells: int, pixels: int) -> _Axis:
    """Pixel centres lie at (y + 0.5) * cells / pixels - 0.5 between cell centres 0..cells-1."""
    positions = (np.arange(pixels) + 0.5) * (cells / pixels) + 0.5  # one cell more: the border is padded
    gaps = np.minimum(positions.astype(np.intp), cells)
    starts = np.searchsorted(gaps, np.arange(cells + 2))
    return _Axis(starts=starts, weights=(positions - gaps).astype(np.float32))


def _take_corners(padded: Shaped[np.ndarray, "*N h+2 w+2"]) -> Shaped[np.ndarray, "4 *N h+1 w+1"]:
    """What stands at the corners of every gap: upper left, upper right, lower left, lower right."""
    upper, lower = padded[..., :-1, :], padded[..., 1:, :]
    return np.stack([upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]])


def _list_corners(
    padded: Shaped[np.ndarray, "N h+2 w+2"],
    number: Int[np.ndarray, "K"] | slice,
    i: Int[np.ndarray, "K"],
    j: Int[np.ndarray, "K"],
) -> Shaped[np.ndarray, "4 *N K"]:
    """The same for some gaps."""
    return np.stack([padded[number, i + down, j + right] for down in (0, 1) for right in (0, 1)])


def _find_bounds(is_used: Bool[np.ndarray, "N n"]) -> tuple[list[int], list[int]]:
    """The first used place of each row and the one after its last; equal if none is used."""
    firsts, lasts = is_used.argmax(1), is_used.shape[1] - is_used[:, ::-1].argmax(1)
    return firsts.tolist(), np.where(is_used.any(1), lasts, firsts).tolist()


def _write_blocks(
    plane: Shaped[np.ndarray, "H W"],
    y: Int[np.ndarray, "K n"],
    x: Int[np.ndarray, "K m"],
    values: Shaped[np.ndarray, "K n m"],
) -> None:
    """Lay blocks of values on a contiguous plane; a pixel named twice has the same value twice."""
    flat = plane.reshape(-1)
    flat[(y * plane.shape[1])[:, :, None] + x[:, None, :]] = values
