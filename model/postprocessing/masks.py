"""Masks inside boxes: packed binary masks, and soft masks pasted into an image."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8


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
