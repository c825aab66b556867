"""A dense map of stuff clusters."""

import numpy as np
from jaxtyping import Float, Int32

from model.pixels import Placement, resize_map


def label_stuff(
    tokens: Float[np.ndarray, "h w P"], centroids: Float[np.ndarray, "S P"], patch_px: int, placement: Placement
) -> Int32[np.ndarray, "H W"]:
    """The stuff cluster of every pixel of the photo, counted from 1.

    Similarities are enlarged before the best is taken: borders run between patches and not along them.
    """
    similarities = tokens @ centroids.T
    height, width = tokens.shape[0] * patch_px, tokens.shape[1] * patch_px
    best = np.full((placement.height, placement.width), -np.inf, np.float32)
    winners = np.zeros(best.shape, np.int32)
    for index in np.unique(similarities.argmax(-1)):
        plane = np.ascontiguousarray(similarities[..., index], dtype=np.float32)
        placed = resize_map(plane, height, width)[: placement.placed_height, : placement.placed_width]
        challenger = resize_map(placed, placement.height, placement.width)
        winners[challenger > best] = index + 1
        np.maximum(best, challenger, out=best)
    return winners
