"""Masks inside boxes, packed or soft, the detections of a network as binary masks in the size of the image, and maps
of scores upsampled to it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt8

from model.contract import Contract, RawOutputs, Thresholds
from model.images import Letterbox


@dataclass(frozen=True, kw_only=True)
class PackedMask:
    """A binary mask inside its bounding box, eight pixels per byte, so that many large masks fit into memory."""

    top: int
    left: int
    height: int
    width: int
    packed: UInt8[np.ndarray, "bytes"]

    @property
    def bits(self) -> Bool[np.ndarray, "h w"]:
        """The mask, unpacked on each access."""
        flat = np.unpackbits(self.packed, count=self.height * self.width)
        return flat.view(bool).reshape(self.height, self.width)

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the box."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def pack_mask(bits: Bool[np.ndarray, "H W"], *, top: int = 0, left: int = 0) -> PackedMask | None:
    """Pack a mask whose first pixel is at `top` and `left`; None if it is empty."""
    x, y, width, height = cv2.boundingRect(bits.view(np.uint8)) if bits.size else (0, 0, 0, 0)
    if not width:
        return None
    packed = np.packbits(bits[y : y + height, x : x + width])
    return PackedMask(top=top + y, left=left + x, height=height, width=width, packed=packed)


def mask_iou(first: Bool[np.ndarray, "h w"], second: Bool[np.ndarray, "h w"]) -> float:
    """Return the intersection over union of two masks of one size; 0 for two empty masks."""
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / max(1, union)


def packed_mask_iou(first: PackedMask, second: PackedMask) -> float:
    """Return the IoU of two masks."""
    top, left = max(first.top, second.top), max(first.left, second.left)
    bottom = min(first.top + first.height, second.top + second.height)
    right = min(first.left + first.width, second.left + second.width)
    if bottom <= top or right <= left:
        return 0.0
    common = [
        mask.bits[top - mask.top : bottom - mask.top, left - mask.left : right - mask.left] for mask in (first, second)
    ]
    intersection = np.count_nonzero(common[0] & common[1])
    union = np.count_nonzero(first.bits) + np.count_nonzero(second.bits) - intersection
    return float(intersection / union)


def paste_mask(
    mask: Float[np.ndarray, "m m"], box: Float[np.ndarray, "4"], height: int, width: int
) -> tuple[Float32[np.ndarray, "h w"], int, int]:
    """Resize a mask bilinearly to its box (x0, y0, x1, y1) in an image of this size; return it with its top and left.

    As detectron2's `paste_masks_in_image` (layers/mask_ops.py), restricted to the box and one pixel around it: beyond
    its border the mask falls from at most one half to zero. It is empty if the box lies outside the image.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box)
    top, bottom = _pixel_range(y0, y1, height)
    left, right = _pixel_range(x0, x1, width)
    rows = _bilinear_weights(top, bottom, y0, y1, mask.shape[0])
    columns = _bilinear_weights(left, right, x0, x1, mask.shape[1])
    return rows @ mask.astype(np.float32) @ columns.T, top, left


def _pixel_range(start: float, end: float, limit: int) -> tuple[int, int]:
    """Return the pixels from one before `start` to one after `end`, within the image."""
    first = min(max(math.floor(start) - 1, 0), limit)
    return first, max(min(math.ceil(end) + 1, limit), first)


def _bilinear_weights(first: int, last: int, start: float, end: float, cells: int) -> Float32[np.ndarray, "n m"]:
    """Return the weight of each mask cell for pixels first..last-1 along one axis; zeros for an empty box."""
    if end <= start:
        return np.zeros((last - first, cells), np.float32)
    centers = (np.arange(first, last, dtype=np.float32) + np.float32(0.5) - np.float32(start)) / np.float32(end - start)
    distance = np.abs(centers[:, None] * np.float32(cells) - np.float32(0.5) - np.arange(cells, dtype=np.float32))
    weights: Float32[np.ndarray, "n m"] = np.maximum(np.float32(1.0) - distance, np.float32(0.0))
    return weights


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object."""

    cluster: int
    """As in the contract, from 1."""
    score: float
    mask: PackedMask


def decode_detections(
    raw: RawOutputs,
    letterbox: Letterbox,
    contract: Contract,
    thresholds: Thresholds,
    better: Sequence[Detection] = (),
    max_score: float = math.inf,
) -> list[Detection]:
    """Return detections above the score threshold that are not empty, best first, without duplicates.

    They follow those in `better`, which were decoded before, and score below `max_score`.
    """
    scores = raw.scores.astype(np.float64)
    is_wanted = (scores >= thresholds.score_threshold) & (scores > 0.0) & (scores < max_score)  # NaN is none of these
    order = np.argsort(-scores, kind="stable")
    masks = raw.masks if contract.box_mask_size else raw.masks[:, : letterbox.map_height, : letterbox.map_width]
    components = [
        (index, component)
        for index in order[is_wanted[order]]
        for component in split_components(masks[index], thresholds)
    ]
    detections, max_iou = list(better), thresholds.duplicate_iou_threshold
    packed = _upsample_masks(components, raw.boxes, letterbox, contract, thresholds)
    for (index, _), mask in zip(components, packed, strict=True):
        if mask and not (max_iou < 1.0 and any(packed_mask_iou(mask, each.mask) > max_iou for each in detections)):
            cluster, score = int(raw.clusters[index]) + 1, float(raw.scores[index])
            detections.append(Detection(cluster=cluster, score=score, mask=mask))
    return detections


def split_components(probabilities: Float[np.ndarray, "h w"], thresholds: Thresholds) -> list[Float[np.ndarray, "h w"]]:
    """Return the mask once per connected component that is large enough, largest first, without the other ones."""
    if not thresholds.min_component_area_fraction:
        return [probabilities]
    cells = (probabilities > thresholds.mask_threshold).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(cells)
    if not width:
        return []
    count, _ = cv2.connectedComponents(cells[top : top + height, left : left + width], connectivity=8)
    if count == 2:  # the background counts as one, even if it is empty
        return [probabilities]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    min_area = thresholds.min_component_area_fraction * areas.max()
    kept = [index for index in np.argsort(-areas, kind="stable") if areas[index] >= min_area]
    return [np.where((labels == 0) | (labels == index + 1), probabilities, np.float32(0.0)) for index in kept]


def _upsample_masks(
    masks: list[tuple[int, Float[np.ndarray, "h w"]]],
    boxes: Float[np.ndarray, "D 4"],
    letterbox: Letterbox,
    contract: Contract,
    thresholds: Thresholds,
) -> Iterator[PackedMask | None]:
    """Yield each mask, given with the index of its box, in the size of the image; None for one that is empty there."""
    if contract.box_mask_size:
        limits = np.array([letterbox.width, letterbox.height] * 2)
        scale = limits / np.array([letterbox.resized_width, letterbox.resized_height] * 2)
        for index, mask in masks:
            box = (boxes[index] * scale).clip(0.0, limits)
            probabilities, top, left = paste_mask(mask, box, letterbox.height, letterbox.width)
            yield pack_mask(probabilities > thresholds.mask_threshold, top=top, left=left)
    elif masks:
        upsampler = BilinearUpsampler((letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width))
        yield from upsampler.threshold(np.stack([mask for _, mask in masks]), thresholds.mask_threshold)


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


class BilinearUpsampler:
    """Upsamples score maps of `cells` (rows, columns) to decisions for `pixels` (height, width).

    The pixels between four neighboring cell centers form a block, and these cells are its corners. A bilinear map stays
    between the values of the corners: where all four lead to the same decision, so do all pixels of the block. The
    other blocks lie along borders, about a tenth of an image. The result is that of interpolating the whole map
    (`model.images.resize_map`), except for rounding in ties. Measured at 2.5 megapixels: argmax takes 3 ms instead of
    20.
    """

    def __init__(self, cells: tuple[int, int], pixels: tuple[int, int]) -> None:
        self._pixels = pixels
        self._rows, self._columns = (_make_axis(*lengths) for lengths in zip(cells, pixels, strict=True))
        self._has_pixels = (self._rows.lengths[:, None] > 0) & (self._columns.lengths > 0)

    def threshold(self, maps: Float[np.ndarray, "N h w"], threshold: float) -> Iterator[PackedMask | None]:
        """Yield the pixels of each map above the threshold; None if there are none."""
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
        corners = _take_corners(padded > threshold)
        blocks = np.logical_or.reduce(corners) & self._has_pixels
        is_uniform = np.logical_and.reduce(corners)
        index, i, j = np.nonzero(blocks & ~is_uniform)
        y, x = self._rows.list_pixels(i), self._columns.list_pixels(j)
        values = self._interpolate(_list_corners(padded, index, i, j), y, x) > threshold
        bounds = np.searchsorted(index, np.arange(len(maps) + 1))
        for n, (first, last) in enumerate(pairwise(bounds)):
            column, row, width, height = cv2.boundingRect(blocks[n].view(np.uint8))
            if not width:
                yield None
                continue
            rows, columns = slice(row, row + height), slice(column, column + width)
            top, left = int(self._rows.starts[rows.start]), int(self._columns.starts[columns.start])
            bits = self._fill_blocks(is_uniform[n], rows, columns)
            _write_blocks(bits, y[first:last] - top, x[first:last] - left, values[first:last])
            yield pack_mask(bits, top=top, left=left)

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
        left, and the sign of their difference decides; in the other blocks, candidates are compared one after another.
        """
        is_candidate = corners.max(0) >= corners.min(0).max(0)
        winners = np.zeros((len(y), y.shape[1], x.shape[1]), labels.dtype)
        has_two = is_candidate.sum(0) == 2
        pairs, others = np.flatnonzero(has_two), np.flatnonzero(~has_two)
        first = is_candidate[:, pairs].argmax(0)
        second = len(labels) - 1 - is_candidate[::-1, pairs].argmax(0)
        lead = self._interpolate(corners[:, first, pairs] - corners[:, second, pairs], y[pairs], x[pairs])
        winners[pairs] = np.where(lead >= 0.0, labels[first, None, None], labels[second, None, None])
        best = np.full(winners.shape, -np.inf, np.float32)
        for index in np.flatnonzero(is_candidate[:, others].any(1)):
            chosen = others[is_candidate[index, others]]
            values = self._interpolate(corners[:, index, chosen], y[chosen], x[chosen])
            winners[chosen] = np.where(values > best[chosen], labels[index], winners[chosen])
            best[chosen] = np.maximum(values, best[chosen])
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


def _write_blocks(
    image: Shaped[np.ndarray, "H W"],
    y: Int[np.ndarray, "K n"],
    x: Int[np.ndarray, "K m"],
    values: Shaped[np.ndarray, "K n m"],
) -> None:
    """Write blocks into a contiguous image; a pixel that occurs twice has the same value twice."""
    flat = image.reshape(-1)
    flat[(y * image.shape[1])[:, :, None] + x[:, None, :]] = values
