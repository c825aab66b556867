"""Masks inside their boxes, small enough to hold many of them."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, UInt8


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A mask inside its box, eight pixels a byte: many large masks may be held at once."""

    top: int
    left: int
    height: int
    width: int
    packed: UInt8[np.ndarray, "bytes"]

    @property
    def bits(self) -> Bool[np.ndarray, "h w"]:
        """The mask, unpacked anew."""
        flat = np.unpackbits(self.packed, count=self.height * self.width)
        return flat.view(bool).reshape(self.height, self.width)

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the box."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def pack_crop(bits: Bool[np.ndarray, "H W"], *, top: int = 0, left: int = 0) -> Crop | None:
    """The mask, which begins at `top` and `left`, inside the box around its pixels; None if it has none."""
    x, y, width, height = cv2.boundingRect(bits.view(np.uint8)) if bits.size else (0, 0, 0, 0)
    if not width:
        return None
    packed = np.packbits(bits[y : y + height, x : x + width])
    return Crop(top=top + y, left=left + x, height=height, width=width, packed=packed)


def measure_iou(first: Crop, second: Crop) -> float:
    """The share of their union that two masks have in common."""
    top, left = max(first.top, second.top), max(first.left, second.left)
    bottom = min(first.top + first.height, second.top + second.height)
    right = min(first.left + first.width, second.left + second.width)
    if bottom <= top or right <= left:
        return 0.0
    shared = np.count_nonzero(_cut(first, top, left, bottom, right) & _cut(second, top, left, bottom, right))
    union = np.count_nonzero(first.bits) + np.count_nonzero(second.bits) - shared
    return float(shared / union)


def _cut(crop: Crop, top: int, left: int, bottom: int, right: int) -> Bool[np.ndarray, "h w"]:
    return crop.bits[top - crop.top : bottom - crop.top, left - crop.left : right - crop.left]
