"""Whitened features and the codebook of pseudo-classes found in them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float16
from torch.nn import functional

from model.errors import ConfigError, LabelStoreError
from model.files import read_arrays, replace_file

SEMANTIC_TAPS = (2, 3)
"""Of the tapped maps: the third quarter's last block and the encoder's last (blocks 8 and 11 of twelve)."""
_ITERATIONS = 50
_RESTARTS = 5


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """How a feature becomes a cluster; clusters are rows, counted from 0."""

    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    """Principal axes, each divided by its deviation."""
    things: Float[np.ndarray, "K P"]
    stuff: Float[np.ndarray, "S P"]

    def write(self, path: Path) -> None:
        with replace_file(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, **asdict(self))


def read_codebook(path: Path) -> Codebook:
    """Raises LabelStoreError if the file is missing or no codebook."""
    try:
        return Codebook(**read_arrays(path))
    except (ValueError, TypeError) as error:
        raise LabelStoreError(f"{path} is no codebook: {error}") from error


def join_taps(maps: Float16[np.ndarray, "T h w C"]) -> Float[np.ndarray, "h w E"]:
    """The semantic blocks side by side, each token of each block normalised, so that no block outweighs another."""
    blocks = torch.from_numpy(np.asarray(maps[list(SEMANTIC_TAPS)], dtype=np.float32))
    normed = functional.layer_norm(blocks, blocks.shape[-1:])
    joined: Float[np.ndarray, "h w E"] = normed.permute(1, 2, 0, 3).flatten(2).numpy()
    return joined


def fit_whitening(
    sample: Float[np.ndarray, "N E"], components: int
) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E P"]]:
    """Mean and whitening projection onto the first `components` principal axes."""
    if len(sample) <= components:
        raise ConfigError(f"{len(sample)} tokens cannot fix {components} components: label more photos")
    mean = sample.mean(0)
    centred = sample - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(sample))
    best = np.argsort(-variances)[:components]
    return mean, axes[:, best] / np.sqrt(np.maximum(variances[best], 1e-12))


def whiten(
    tokens: Float[np.ndarray, "*N E"], mean: Float[np.ndarray, "E"], projection: Float[np.ndarray, "E P"]
) -> Float[np.ndarray, "*N P"]:
    """Whitened tokens of unit length."""
    projected: Float[np.ndarray, "*N P"] = (tokens - mean) @ projection
    projected /= np.maximum(np.linalg.norm(projected, axis=-1, keepdims=True), 1e-12)
    return projected


def cluster(vectors: Float[np.ndarray, "N P"], count: int, seed: int) -> Float[np.ndarray, "K P"]:
    """Unit-length centroids of a spherical k-means, the best of a few random starts."""
    if len(vectors) < count:
        raise ConfigError(f"{len(vectors)} vectors cannot make {count} clusters: label more photos or ask for fewer")
    solver = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=_ITERATIONS,
        nredo=_RESTARTS,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
    )
    solver.train(np.ascontiguousarray(vectors, dtype=np.float32))
    assert solver.centroids is not None, "training leaves centroids"
    return np.asarray(solver.centroids)


def assign(vectors: Float[np.ndarray, "*N P"], centroids: Float[np.ndarray, "K P"]) -> np.ndarray:
    """The most similar centroid of each vector, counted from 0."""
    nearest: np.ndarray = (vectors @ centroids.T).argmax(-1)
    return nearest
