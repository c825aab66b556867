"""Patch masks moved to the borders in the picture, by a guided filter or by the paper's dense CRF."""

import importlib.util
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8
from scipy import ndimage

from model.errors import ConfigError
from model.images import Letterbox, resize_map
from training.choices import RefinementMethod
from training.pseudo_labels.maskcut import mask_iou

MaskFilter = Callable[[Float[np.ndarray, "H W"]], Bool[np.ndarray, "H W"]]
"""From a soft mask in pixels to a hard one."""

_MIN_IOU_KEPT = 0.5
_RADIUS = 1 / 32
"""Of the long side: 14 px at 448."""
_EPSILON = 1e-3
_SUBSAMPLING = 4
"""Than the guide: where the filter's linear models are fitted."""
_MASK_CRF_ITERATIONS = 10
_MASK_CRF_SMOOTHNESS = {"sxy": 3, "compat": 7}
_MASK_CRF_APPEARANCE = {"sxy": 50, "srgb": 5, "compat": 10}
"""The paper's pairwise terms: for smoothness, and for pixels of one colour."""


def refine_masks(
    masks: Float[np.ndarray, "N h w"] | Bool[np.ndarray, "N h w"],
    image: UInt8[np.ndarray, "H W 3"],
    patch_px: int,
    method: RefinementMethod = "guided",
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
        if mask_iou(fine, soft > 0.5) >= _MIN_IOU_KEPT:
            refined[place] = fine
    return refined


def check_refinement_method(method: RefinementMethod) -> None:
    """Raise ConfigError if the method needs a package that is not there."""
    if method == "crf":
        require_pydensecrf("refinement by a dense CRF")


def make_guided_filter(image: UInt8[np.ndarray, "H W 3"]) -> MaskFilter:
    """A guided filter with the picture's brightness as guide; no compiler, no training."""
    guide = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    guided = GuidedFilter(guide, round(max(guide.shape) * _RADIUS))
    return lambda soft: guided.smooth(soft) > 0.5


class GuidedFilter:
    """The fast guided filter (He and Sun, 2015) with a grey guide in 0..1; what depends on it alone is made once."""

    def __init__(self, guide: Float[np.ndarray, "H W"], radius: int) -> None:
        self._guide = guide
        height, width = (max(1, length // _SUBSAMPLING) for length in guide.shape)
        self._size = (width, height)
        self._window = (2 * max(1, radius // _SUBSAMPLING) + 1,) * 2
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


def make_dense_crf(image: UInt8[np.ndarray, "H W 3"]) -> MaskFilter:
    """The dense CRF of CutLER's maskcut/crf.py, holes filled afterwards; the picture's part is made once.

    The unary term is as weak as there: the mask itself is taken for logits, so that a pixel in it has 0.73.
    Unlike there a mask's patches are enlarged bilinearly before they are made hard, and are no squares.
    """
    check_refinement_method("crf")
    from pydensecrf.densecrf import DenseCRF2D

    height, width = image.shape[:2]
    field = DenseCRF2D(width, height, 2)
    field.addPairwiseGaussian(**_MASK_CRF_SMOOTHNESS)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_MASK_CRF_APPEARANCE)

    def settle(soft: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        mask = (soft > 0.5).astype(np.float32)
        logits = np.stack([1.0 - mask, mask])
        energy = np.log(np.exp(logits).sum(0)) - logits
        field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(2, -1)))
        beliefs = np.array(field.inference(_MASK_CRF_ITERATIONS)).reshape(2, height, width)
        filled: Bool[np.ndarray, "H W"] = ndimage.binary_fill_holes(beliefs[1] > beliefs[0])
        return filled

    return settle


def require_pydensecrf(purpose: str) -> None:
    """Raise ConfigError, with the `purpose` that needs it, if the package is not there."""
    if importlib.util.find_spec("pydensecrf") is None:
        raise ConfigError(f"{purpose} needs pydensecrf2, which a C++ compiler builds: pip install 'useg[crf]'")


_LOGIT_SCALE = 2.0
"""Cosines times this are the logits."""
_STUFF_CRF_ITERATIONS = 10
_STUFF_CRF_SMOOTHNESS = {"sxy": 1, "compat": 3}
_STUFF_CRF_APPEARANCE = {"sxy": 67, "srgb": 3, "compat": 4}
"""The pairwise terms of mhamilton723/STEGO's src/crf.py: for smoothness, and for pixels of one colour."""


def refine_stuff(
    image: UInt8[np.ndarray, "H W 3"], cosines: Float[np.ndarray, "h w S"], patch_px: int, letterbox: Letterbox
) -> Int32[np.ndarray, "H W"]:
    """The stuff cluster of every pixel, counted from 1, as STEGO's evaluation finds it.

    Unlike there it is cosines that are enlarged and not codes, and nothing is averaged with a mirrored photo.
    """
    from pydensecrf.densecrf import DenseCRF2D

    height, width, clusters = letterbox.height, letterbox.width, cosines.shape[-1]
    logits = np.empty((clusters, height, width), np.float32)
    for index in range(clusters):
        plane = np.ascontiguousarray(cosines[..., index], dtype=np.float32)
        large = resize_map(plane, plane.shape[0] * patch_px, plane.shape[1] * patch_px)
        placed = large[: letterbox.resized_height, : letterbox.resized_width]
        logits[index] = _LOGIT_SCALE * resize_map(placed, height, width)
    energy = np.log(np.exp(logits).sum(0)) - logits
    field = DenseCRF2D(width, height, clusters)
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(clusters, -1)))
    field.addPairwiseGaussian(**_STUFF_CRF_SMOOTHNESS)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_STUFF_CRF_APPEARANCE)
    beliefs = np.array(field.inference(_STUFF_CRF_ITERATIONS)).reshape(clusters, height, width)
    winners: Int32[np.ndarray, "H W"] = (beliefs.argmax(0) + 1).astype(np.int32)
    return winners
