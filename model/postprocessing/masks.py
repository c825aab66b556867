"""Masks inside boxes, packed or soft, and the detections of a network as binary masks in the size of the image."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from model.contract import Contract, Thresholds
from model.images import Letterbox
from model.network_io import RawOutputs
from model.postprocessing.upsampling import BilinearUpsampler


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
    intersection = np.count_nonzero(
        _crop_bits(first, top, left, bottom, right) & _crop_bits(second, top, left, bottom, right)
    )
    union = np.count_nonzero(first.bits) + np.count_nonzero(second.bits) - intersection
    return float(intersection / union)


@dataclass(frozen=True, kw_only=True)
class SoftMask:
    """Mask probabilities around a box; they are below one half everywhere else."""

    top: int
    left: int
    probabilities: Float32[np.ndarray, "h w"]
    """h or w is 0 if the box lies outside the image."""


def paste_mask(mask: Float[np.ndarray, "m m"], box: Float[np.ndarray, "4"], height: int, width: int) -> SoftMask:
    """Resize a mask bilinearly to its box (x0, y0, x1, y1) in an image of this size.

    As detectron2's `paste_masks_in_image` (layers/mask_ops.py), restricted to the box and one pixel around it: beyond
    its border the mask falls from at most one half to zero.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box)
    top, bottom = _pixel_range(y0, y1, height)
    left, right = _pixel_range(x0, x1, width)
    rows = _bilinear_weights(top, bottom, y0, y1, mask.shape[0])
    columns = _bilinear_weights(left, right, x0, x1, mask.shape[1])
    return SoftMask(top=top, left=left, probabilities=rows @ mask.astype(np.float32) @ columns.T)


def _crop_bits(mask: PackedMask, top: int, left: int, bottom: int, right: int) -> Bool[np.ndarray, "h w"]:
    return mask.bits[top - mask.top : bottom - mask.top, left - mask.left : right - mask.left]


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
    soft = _list_soft_detections(raw, letterbox, contract, thresholds, max_score)
    detections = list(better)
    for found, mask in zip(soft, _upsample_masks(soft, letterbox, contract, thresholds), strict=True):
        if mask and not _is_duplicate(mask, detections, thresholds):
            detections.append(Detection(cluster=found.cluster, score=found.score, mask=mask))
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


@dataclass(frozen=True, kw_only=True)
class _SoftDetection:
    cluster: int
    score: float
    box: Float[np.ndarray, "4"]
    probabilities: Float[np.ndarray, "h w"]


def _list_soft_detections(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds, max_score: float
) -> list[_SoftDetection]:
    """Return detections with a score from the threshold to below `max_score`, best first, masks as the network's."""
    found = []
    for index in np.argsort(-raw.scores, kind="stable"):
        score = float(raw.scores[index])
        if score < thresholds.score_threshold or not score > 0.0:  # NaN is neither
            break
        if score >= max_score:
            continue
        mask = raw.masks[index]
        if not contract.box_mask_size:
            mask = mask[: letterbox.map_height, : letterbox.map_width]
        cluster, box = int(raw.clusters[index]) + 1, raw.boxes[index]
        found += [
            _SoftDetection(cluster=cluster, score=score, box=box, probabilities=component)
            for component in split_components(mask, thresholds)
        ]
    return found


def _upsample_masks(
    soft: list[_SoftDetection], letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> Iterator[PackedMask | None]:
    """Yield each mask in the size of the image; None for one that is empty there."""
    if contract.box_mask_size:
        for each in soft:
            yield _paste(each, letterbox, thresholds)
    elif soft:
        upsampler = BilinearUpsampler((letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width))
        maps = np.stack([each.probabilities for each in soft])
        for patch in upsampler.threshold(maps, thresholds.mask_threshold):
            yield pack_mask(patch.bits, top=patch.top, left=patch.left) if patch else None


def _paste(soft: _SoftDetection, letterbox: Letterbox, thresholds: Thresholds) -> PackedMask | None:
    limits = np.array([letterbox.width, letterbox.height] * 2)
    scale = limits / np.array([letterbox.resized_width, letterbox.resized_height] * 2)
    box = (soft.box * scale).clip(0.0, limits)
    pasted = paste_mask(soft.probabilities, box, letterbox.height, letterbox.width)
    return pack_mask(pasted.probabilities > thresholds.mask_threshold, top=pasted.top, left=pasted.left)


def _is_duplicate(mask: PackedMask, better: list[Detection], thresholds: Thresholds) -> bool:
    limit = thresholds.duplicate_iou_threshold
    return limit < 1.0 and any(packed_mask_iou(mask, each.mask) > limit for each in better)
