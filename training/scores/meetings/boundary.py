"""How well the outline of a mask follows that of an object."""

import math

import cv2
import numpy as np
from jaxtyping import Bool

TOLERANCE = 0.0075
"""Of the picture's diagonal (Martin et al., 2004)."""


def measure_boundary(mask: Bool[np.ndarray, "H W"], true: Bool[np.ndarray, "H W"]) -> float:
    """Boundary F in 0..1: harmonic mean of the shares of either outline that lie near the other; 0 if one has none.

    Near is 0.75 % of the diagonal, in whole pixels rounded up, by Euclidean distance. Where an object leaves the
    picture it has no outline.
    """
    found, expected = _outline(mask), _outline(true)
    if not found.any() or not expected.any():
        return 0.0
    tolerance_px = math.ceil(TOLERANCE * math.hypot(*mask.shape))
    precision = (_measure_distance(expected)[found] <= tolerance_px).mean()
    recall = (_measure_distance(found)[expected] <= tolerance_px).mean()
    return float(2.0 * precision * recall / max(precision + recall, 1e-12))


def _outline(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels of the mask with a neighbour, up, down, left or right, that is none."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.view(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    outline: Bool[np.ndarray, "H W"] = mask & (inner == 0)
    return outline


def _measure_distance(outline: Bool[np.ndarray, "H W"]) -> np.ndarray:
    """Pixels to the nearest pixel of the outline."""
    return cv2.distanceTransform((~outline).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
