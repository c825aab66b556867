"""A network's answer before anything is decided."""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Int64


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The answer for one picture, static in shape, detections in no order."""

    scores: Float32[np.ndarray, "D"]
    clusters: Int64[np.ndarray, "D"]
    """Thing clusters counted from 0."""
    boxes: Float32[np.ndarray, "D 4"]
    """x0, y0, x1, y1 in pixels of the canvas."""
    masks: Float32[np.ndarray, "D h w"]
    """Probabilities at the contract's stride in the picture, or in the cells of each box, as the contract says."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Logits; 0 is "things", s is stuff cluster s."""


PARTS = tuple(entry.name for entry in fields(Raw))
"""The outputs of every network, by name and in order."""
