"""Patch masks moved to the borders in the picture, by a guided filter or by the paper's dense CRF."""

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from model.pixels import resize_map
from training.choices import Refinement
from training.labels.masks.dense_crf import require_dense_crf
from training.labels.masks.discover import overlap

Filter = Callable[[Float[np.ndarray, "H W"]], Bool[np.ndarray, "H W"]]
"""From a soft mask in pixels to a hard one."""

_LEAST_KEPT = 0.5
_RADIUS = 1 / 32
"""Of the long side: 14 px at 448."""
_EPSILON = 1e-3
_COARSER = 4
"""Than the guide: where the filter's linear models are fitted."""
_ROUNDS = 10
_NEAR = {"sxy": 3, "compat": 7}
_ALIKE = {"sxy": 50, "srgb": 5, "compat": 10}
"""The paper's pairwise terms: for smoothness, and for pixels of one colour."""


def refine(
    masks: Float[np.ndarray, "N h w"] | Bool[np.ndarray, "N h w"],
    image: UInt8[np.ndarray, "H W 3"],
    patch_px: int,
    method: Refinement = "guided",
) -> Bool[np.ndarray, "N H W"]:
    """Hard masks in pixels; one of which too little was left is empty (IoU with what it was below 0.5, as CutLER).

    `masks` are in 0..1. `image` starts where they do and may end inside their last patches.
    Raises ConfigError if the method needs a package that is not there.
    """
    height, width = image.shape[:2]
    refined = np.zeros((len(masks), height, width), bool)
    move = make_guided_filter(image) if method == "guided" else make_dense_crf(image)
    for place, mask in enumerate(masks):
        whole = mask.shape[0] * patch_px, mask.shape[1] * patch_px
        soft = resize_map(mask.astype(np.float32), *whole)[:height, :width]
        fine = move(soft)
        if overlap(fine, soft > 0.5) >= _LEAST_KEPT:
            refined[place] = fine
    return refined


def check_refinement(method: Refinement) -> None:
    """Raise ConfigError if the method needs a package that is not there."""
    if method == "crf":
        require_dense_crf("refinement by a dense CRF")


def make_guided_filter(image: UInt8[np.ndarray, "H W 3"]) -> Filter:
    """A guided filter with the picture's brightness as guide; no compiler, no training."""
    guide = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    guided = GuidedFilter(guide, round(max(guide.shape) * _RADIUS))
    return lambda soft: guided.smooth(soft) > 0.5


class GuidedFilter:
    """The fast guided filter (He and Sun, 2015) with a grey guide in 0..1; what depends on it alone is made once."""

    def __init__(self, guide: Float[np.ndarray, "H W"], radius: int) -> None:
        self._guide = guide
        height, width = (max(1, length // _COARSER) for length in guide.shape)
        self._size = (width, height)
        self._window = (2 * max(1, radius // _COARSER) + 1,) * 2
        self._small = cv2.resize(guide, self._size, interpolation=cv2.INTER_AREA)
        self._mean = self._blur(self._small)
        self._variance = self._blur(self._small * self._small) - self._mean * self._mean

    def smooth(self, soft: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
        """The map, its borders moved to those of the guide."""
        small = cv2.resize(soft, self._size, interpolation=cv2.INTER_AREA)
        mean = self._blur(small)
        slope = (self._blur(self._small * small) - self._mean * mean) / (self._variance + _EPSILON)
        offset = mean - slope * self._mean
        height, width = self._guide.shape
        smoothed: Float[np.ndarray, "H W"] = resize_map(self._blur(slope), height, width) * self._guide
        smoothed += resize_map(self._blur(offset), height, width)
        return smoothed

    def _blur(self, plane: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
        return cv2.blur(plane, self._window)


def make_dense_crf(image: UInt8[np.ndarray, "H W 3"]) -> Filter:
    """The dense CRF of CutLER's maskcut/crf.py, holes filled afterwards; the picture's part is made once.

    The unary term is as weak as there: the mask itself is taken for logits, so that a pixel in it has 0.73.
    Unlike there a mask's patches are enlarged bilinearly before they are made hard, and are no squares.
    """
    check_refinement("crf")
    from pydensecrf.densecrf import DenseCRF2D

    height, width = image.shape[:2]
    field = DenseCRF2D(width, height, 2)
    field.addPairwiseGaussian(**_NEAR)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_ALIKE)

    def settle(soft: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        mask = (soft > 0.5).astype(np.float32)
        logits = np.stack([1.0 - mask, mask])
        energy = np.log(np.exp(logits).sum(0)) - logits
        field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(2, -1)))
        beliefs = np.array(field.inference(_ROUNDS)).reshape(2, height, width)
        filled: Bool[np.ndarray, "H W"] = ndimage.binary_fill_holes(beliefs[1] > beliefs[0])
        return filled

    return settle
