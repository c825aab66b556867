"""Stuff moved to the borders in the picture by STEGO's dense CRF; an extra that needs a compiler."""

import numpy as np
from jaxtyping import Float, Int32, UInt8

from model.pixels import Placement, resize_map

_SHARPNESS = 2.0
"""Cosines times this are the logits."""
_ROUNDS = 10
_NEAR = {"sxy": 1, "compat": 3}
_ALIKE = {"sxy": 67, "srgb": 3, "compat": 4}
"""The pairwise terms of mhamilton723/STEGO's src/crf.py: for smoothness, and for pixels of one colour."""


def settle(
    image: UInt8[np.ndarray, "H W 3"], cosines: Float[np.ndarray, "h w S"], patch_px: int, placement: Placement
) -> Int32[np.ndarray, "H W"]:
    """The stuff cluster of every pixel, counted from 1, as STEGO's evaluation finds it.

    Unlike there it is cosines that are enlarged and not codes, and nothing is averaged with a mirrored photo.
    """
    from pydensecrf.densecrf import DenseCRF2D

    height, width, clusters = placement.height, placement.width, cosines.shape[-1]
    logits = np.empty((clusters, height, width), np.float32)
    for index in range(clusters):
        plane = np.ascontiguousarray(cosines[..., index], dtype=np.float32)
        large = resize_map(plane, plane.shape[0] * patch_px, plane.shape[1] * patch_px)
        placed = large[: placement.placed_height, : placement.placed_width]
        logits[index] = _SHARPNESS * resize_map(placed, height, width)
    energy = np.log(np.exp(logits).sum(0)) - logits
    field = DenseCRF2D(width, height, clusters)
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(clusters, -1)))
    field.addPairwiseGaussian(**_NEAR)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_ALIKE)
    beliefs = np.array(field.inference(_ROUNDS)).reshape(clusters, height, width)
    winners: Int32[np.ndarray, "H W"] = (beliefs.argmax(0) + 1).astype(np.int32)
    return winners
