"""Refinement: moves the borders of patch masks and stuff maps to image edges, by a guided filter."""

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from model.images import resize_map
from model.postprocessing.masks import mask_iou

_MIN_IOU_KEPT = 0.5
_RADIUS_FRACTION = 1 / 32
"""Of the long side: 14 px at 448."""
_EPSILON = 1e-3
_SUBSAMPLING = 4
"""Downscaling at which the guided filter fits its linear models."""


def refine_masks(
    masks: Float[np.ndarray, "N h w"], image: UInt8[np.ndarray, "H W 3"], patch_px: int
) -> Bool[np.ndarray, "N H W"]:
    """Return binary masks in pixels of `image`; as in CutLER, a mask whose IoU with its input is below 0.5 is empty.

    The guide is the brightness of the image. `masks` are in 0..1. `image` has the same origin and may end inside their
    last patches. Unlike CutLER, no dense CRF: it finds AP +0.1 for 30 times the cost.
    """
    height, width = image.shape[:2]
    refined = np.zeros((len(masks), height, width), bool)
    guide = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    guided = GuidedFilter(guide, round(max(guide.shape) * _RADIUS_FRACTION))
    for index, mask in enumerate(masks):
        whole = mask.shape[0] * patch_px, mask.shape[1] * patch_px
        soft = resize_map(mask.astype(np.float32), *whole)[:height, :width]
        fine = guided.filter(soft) > 0.5
        if mask_iou(fine, soft > 0.5) >= _MIN_IOU_KEPT:
            refined[index] = fine
    return refined


class GuidedFilter:
    """Fast guided filter (He and Sun, 2015) with a gray guide in 0..1; statistics of the guide are computed once."""

    def __init__(self, guide: Float[np.ndarray, "H W"], radius: int) -> None:
        self._guide = guide
        height, width = (max(1, length // _SUBSAMPLING) for length in guide.shape)
        self._size = (width, height)
        self._window = (2 * max(1, radius // _SUBSAMPLING) + 1,) * 2
        self._small = cv2.resize(guide, self._size, interpolation=cv2.INTER_AREA)
        self._mean = self._blur(self._small)
        self._variance = self._blur(self._small * self._small) - self._mean * self._mean

    def filter(self, soft: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
        """Move the borders of the map to the edges of the guide."""
        small = cv2.resize(soft, self._size, interpolation=cv2.INTER_AREA)
        mean = self._blur(small)
        slope = (self._blur(self._small * small) - self._mean * mean) / (self._variance + _EPSILON)
        offset = mean - slope * self._mean
        height, width = self._guide.shape
        filtered: Float[np.ndarray, "H W"] = resize_map(self._blur(slope), height, width) * self._guide
        filtered += resize_map(self._blur(offset), height, width)
        return filtered

    def _blur(self, plane: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
        return cv2.blur(plane, self._window)
