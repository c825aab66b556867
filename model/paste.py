"""Masks inside boxes to masks in a picture."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A soft mask where its box lies; it is zero, or too weak to matter, everywhere else."""

    top: int
    left: int
    soft: Float32[np.ndarray, "h w"]
    """Probabilities; h or w is 0 if the box lies outside the picture."""


def paste(mask: Float[np.ndarray, "m m"], box: Float[np.ndarray, "4"], height: int, width: int) -> Patch:
    """A mask of m x m cells, bilinear between its cell centres, over the pixels of its box (x0, y0, x1, y1).

    As detectron2's `paste_masks_in_image` (layers/mask_ops.py), cut to the box and a pixel around it: beyond its border
    the mask fades to zero from at most a half.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box)
    top, bottom = _cut(y0, y1, height)
    left, right = _cut(x0, x1, width)
    rows = _weigh(top, bottom, y0, y1, mask.shape[0])
    columns = _weigh(left, right, x0, x1, mask.shape[1])
    return Patch(top=top, left=left, soft=rows @ mask.astype(np.float32) @ columns.T)


def _cut(start: float, end: float, limit: int) -> tuple[int, int]:
    """The pixels from one before `start` to one after `end`, within the picture."""
    first = min(max(math.floor(start) - 1, 0), limit)
    return first, max(min(math.ceil(end) + 1, limit), first)


def _weigh(first: int, last: int, start: float, end: float, cells: int) -> Float32[np.ndarray, "n m"]:
    """How much each cell counts for each pixel first..last-1 along one axis; nothing on an axis without length."""
    if end <= start:
        return np.zeros((last - first, cells), np.float32)
    centres = (np.arange(first, last, dtype=np.float32) + np.float32(0.5) - np.float32(start)) / np.float32(end - start)
    distance = np.abs(centres[:, None] * np.float32(cells) - np.float32(0.5) - np.arange(cells, dtype=np.float32))
    weights: Float32[np.ndarray, "n m"] = np.maximum(np.float32(1.0) - distance, np.float32(0.0))
    return weights
