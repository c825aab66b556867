"""Operations on arrays that several parts share."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int, Integer

from model.errors import ConfigError

_ROWS = 8192
"""Rows that are copied at once: a sample of features is large."""


def fit_whitening(
    sample: Float[np.ndarray, "N E"], pca_dim: int
) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E P"]]:
    """Return the mean and the whitening projection onto the first principal axes.

    Raises ConfigError if there are too few tokens.
    """
    if len(sample) <= pca_dim:
        raise ConfigError(f"{len(sample)} tokens are too few for {pca_dim} PCA dimensions: label more photos")
    mean = sample.mean(0)
    covariance = np.zeros((sample.shape[1], sample.shape[1]))
    for start in range(0, len(sample), _ROWS):
        centered = sample[start : start + _ROWS] - mean
        covariance += centered.T @ centered
    variances, axes = np.linalg.eigh((covariance / len(sample)).astype(sample.dtype))
    best = np.argsort(-variances)[:pca_dim]
    return mean, axes[:, best] / np.sqrt(np.maximum(variances[best], 1e-12))


def l2_normalize(vectors: Float[np.ndarray, "*N C"]) -> Float[np.ndarray, "*N C"]:
    """Scale vectors to unit length; zeros stay zeros."""
    unit: Float[np.ndarray, "*N C"] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit


def ids_to_positions(ids: Integer[np.ndarray, "*S"], listed: Iterable[int]) -> Int[np.ndarray, "*S"]:
    """Return the positions of segment ids in a list of them, counted from 1; 0 for ids that are not listed."""
    keys = np.array(list(listed), np.int64)
    if not keys.size:
        return np.zeros(ids.shape, np.int64)
    order = np.argsort(keys)
    nearest = order[np.searchsorted(keys, ids, sorter=order).clip(max=len(keys) - 1)]
    return np.where(keys[nearest] == ids, nearest + 1, 0)
