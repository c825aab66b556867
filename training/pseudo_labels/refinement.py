"""Refinement: moves the borders of patch masks and stuff maps to image edges, by guided filter or dense CRF."""

import importlib.util
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8
from scipy import ndimage

from model.errors import ConfigError
from model.images import Letterbox, resize_map
from model.postprocessing.masks import mask_iou
from training.data.label_config import RefinementMethod

MaskFilter = Callable[[Float[np.ndarray, "H W"]], Bool[np.ndarray, "H W"]]
"""Maps a soft mask in pixels to a binary one."""

_MIN_IOU_KEPT = 0.5
_RADIUS_FRACTION = 1 / 32
"""Of the long side: 14 px at 448."""
_EPSILON = 1e-3
_SUBSAMPLING = 4
"""Downscaling at which the guided filter fits its linear models."""
_CRF_ITERATIONS = 10
_MASK_CRF_SMOOTHNESS = {"sxy": 3, "compat": 7}
_MASK_CRF_APPEARANCE = {"sxy": 50, "srgb": 5, "compat": 10}
"""Pairwise terms of CutLER's maskcut/crf.py."""
_STUFF_CRF_SMOOTHNESS = {"sxy": 1, "compat": 3}
_STUFF_CRF_APPEARANCE = {"sxy": 67, "srgb": 3, "compat": 4}
"""Pairwise terms of mhamilton723/STEGO's src/crf.py."""
_LOGIT_SCALE = 2.0
"""Logits are cosine similarities times this."""


def refine_masks(
    masks: Float[np.ndarray, "N h w"],
    image: UInt8[np.ndarray, "H W 3"],
    patch_px: int,
    method: RefinementMethod = "guided",
) -> Bool[np.ndarray, "N H W"]:
    """Return binary masks in pixels of `image`; as in CutLER, a mask whose IoU with its input is below 0.5 is empty.

    `masks` are in 0..1. `image` has the same origin and may end inside their last patches.
    Raises ConfigError if the method needs a package that is not installed.
    """
    height, width = image.shape[:2]
    refined = np.zeros((len(masks), height, width), bool)
    refine = make_guided_filter(image) if method == "guided" else make_dense_crf(image)
    for index, mask in enumerate(masks):
        whole = mask.shape[0] * patch_px, mask.shape[1] * patch_px
        soft = resize_map(mask.astype(np.float32), *whole)[:height, :width]
        fine = refine(soft)
        if mask_iou(fine, soft > 0.5) >= _MIN_IOU_KEPT:
            refined[index] = fine
    return refined


def make_guided_filter(image: UInt8[np.ndarray, "H W 3"]) -> MaskFilter:
    """Return a guided filter whose guide is the brightness of the image."""
    guide = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    guided = GuidedFilter(guide, round(max(guide.shape) * _RADIUS_FRACTION))
    return lambda soft: guided.filter(soft) > 0.5


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


def check_crf_available(purpose: str) -> None:
    """Raise ConfigError if the package for dense CRFs, which a C++ compiler builds, is not installed."""
    if importlib.util.find_spec("pydensecrf") is None:
        raise ConfigError(f"{purpose} needs pydensecrf2 (built by a C++ compiler): pip install 'useg[crf]'")


def make_dense_crf(image: UInt8[np.ndarray, "H W 3"]) -> MaskFilter:
    """Return the dense CRF of CutLER's maskcut/crf.py with holes filled; the pairwise terms are computed once.

    The unary term is as weak as there: the mask itself is taken for logits, so a pixel in it has probability 0.73.
    Difference: masks are upsampled bilinearly before they are binarized, and do not consist of squares.
    """
    check_crf_available("mask refinement by a dense CRF")
    from pydensecrf.densecrf import DenseCRF2D

    height, width = image.shape[:2]
    crf = DenseCRF2D(width, height, 2)
    crf.addPairwiseGaussian(**_MASK_CRF_SMOOTHNESS)
    crf.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_MASK_CRF_APPEARANCE)

    def refine(soft: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
        mask = (soft > 0.5).astype(np.float32)
        logits = np.stack([1.0 - mask, mask])
        energy = np.log(np.exp(logits).sum(0)) - logits
        crf.setUnaryEnergy(np.ascontiguousarray(energy.reshape(2, -1)))
        probabilities = np.array(crf.inference(_CRF_ITERATIONS)).reshape(2, height, width)
        filled: Bool[np.ndarray, "H W"] = ndimage.binary_fill_holes(probabilities[1] > probabilities[0])
        return filled

    return refine


def refine_stuff(
    image: UInt8[np.ndarray, "H W 3"], cosines: Float[np.ndarray, "h w S"], patch_px: int, letterbox: Letterbox
) -> Int32[np.ndarray, "H W"]:
    """Return the stuff cluster of every pixel, counted from 1, by the dense CRF of STEGO's evaluation.

    Differences: cosine similarities are upsampled instead of codes, and nothing is averaged with a mirrored photo.
    Raises ConfigError if pydensecrf2 is not installed.
    """
    check_crf_available("stuff refinement by a dense CRF")
    from pydensecrf.densecrf import DenseCRF2D

    height, width, clusters = letterbox.height, letterbox.width, cosines.shape[-1]
    logits = np.empty((clusters, height, width), np.float32)
    for index in range(clusters):
        plane = np.ascontiguousarray(cosines[..., index], dtype=np.float32)
        large = resize_map(plane, plane.shape[0] * patch_px, plane.shape[1] * patch_px)
        shown = large[: letterbox.resized_height, : letterbox.resized_width]
        logits[index] = _LOGIT_SCALE * resize_map(shown, height, width)
    energy = np.log(np.exp(logits).sum(0)) - logits
    crf = DenseCRF2D(width, height, clusters)
    crf.setUnaryEnergy(np.ascontiguousarray(energy.reshape(clusters, -1)))
    crf.addPairwiseGaussian(**_STUFF_CRF_SMOOTHNESS)
    crf.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_STUFF_CRF_APPEARANCE)
    probabilities = np.array(crf.inference(_CRF_ITERATIONS)).reshape(clusters, height, width)
    winners: Int32[np.ndarray, "H W"] = (probabilities.argmax(0) + 1).astype(np.int32)
    return winners
