"""Patches seen together with the objects that they may belong to."""

import numpy as np
from jaxtyping import Float

from training.labels.masks.proposals import Proposals


def blend(tokens: Float[np.ndarray, "h w P"], found: Proposals) -> Float[np.ndarray, "h w P"]:
    """Tokens of unit length, each half itself and half the mean of the masks that it lies in; of unit length again.

    The masks of a patch count by the squares of their scores; a patch in none stays as it is.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    inside = found.hard.reshape(len(found.soft), len(flat)).astype(np.float32)
    means = (inside @ flat) / np.maximum(inside.sum(1, keepdims=True), 1.0)
    weights = inside * np.maximum(found.scores, 0.0)[:, None] ** 2
    blended: Float[np.ndarray, "h w P"] = (flat + _normalise(weights.T @ means)).reshape(tokens.shape)
    return _normalise(blended)


def _normalise(vectors: Float[np.ndarray, "*N P"]) -> Float[np.ndarray, "*N P"]:
    unit: Float[np.ndarray, "*N P"] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit
