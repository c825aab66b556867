"""Whitened features and the clusters in them."""

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float16
from torch.nn import functional

from model.errors import ConfigError
from training.data.label_config import KmeansInit

SEMANTIC_TAPS = (2, 3)
"""Of the tapped maps: the third quarter's last block and the encoder's last (blocks 8 and 11 of twelve)."""
_ROWS = 8192
"""Held at once beside the sample, which is large."""
_ITERATIONS = 50
_RESTARTS = 5
_MAX_RESEEDS = 3


def concat_layers(maps: Float16[np.ndarray, "T h w C"]) -> Float[np.ndarray, "h w E"]:
    """The semantic blocks side by side, each token of each block normalised, so that no block outweighs another."""
    blocks = torch.from_numpy(np.asarray(maps[list(SEMANTIC_TAPS)], dtype=np.float32))
    normed = functional.layer_norm(blocks, blocks.shape[-1:])
    joined: Float[np.ndarray, "h w E"] = normed.permute(1, 2, 0, 3).flatten(2).numpy()
    return joined


def fit_whitening(
    sample: Float[np.ndarray, "N E"], pca_dim: int
) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E P"]]:
    """Mean and whitening projection onto the first `pca_dim` principal axes."""
    if len(sample) <= pca_dim:
        raise ConfigError(f"{len(sample)} tokens cannot fix {pca_dim} components: label more photos")
    mean = sample.mean(0)
    covariance = np.zeros((sample.shape[1], sample.shape[1]))
    for start in range(0, len(sample), _ROWS):
        centred = sample[start : start + _ROWS] - mean
        covariance += centred.T @ centred
    variances, axes = np.linalg.eigh((covariance / len(sample)).astype(sample.dtype))
    best = np.argsort(-variances)[:pca_dim]
    return mean, axes[:, best] / np.sqrt(np.maximum(variances[best], 1e-12))


def whiten(
    tokens: Float[np.ndarray, "*N E"], mean: Float[np.ndarray, "E"], projection: Float[np.ndarray, "E P"]
) -> Float[np.ndarray, "*N P"]:
    """Whitened tokens of unit length."""
    projected: Float[np.ndarray, "*N P"] = tokens @ projection - mean @ projection
    projected /= np.maximum(np.linalg.norm(projected, axis=-1, keepdims=True), 1e-12)
    return projected


def kmeans(
    vectors: Float[np.ndarray, "N P"],
    count: int,
    seed: int,
    *,
    kmeans_init: KmeansInit = "restarts",
    is_spherical: bool = True,
) -> Float[np.ndarray, "K P"]:
    """Centroids of a k-means: of unit length and by angle if it is spherical, else by distance.

    faiss looks at 256 vectors a cluster at most. It splits a large cluster where one is empty; those that are empty in
    the end, as of vectors that are many times the same, are seeded anew where vectors lie farthest from their centroid.
    """
    if len(vectors) < count:
        raise ConfigError(f"{len(vectors)} vectors cannot make {count} clusters: label more photos or ask for fewer")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    centroids = _run_kmeans(vectors, count, seed, is_spherical=is_spherical, kmeans_init=kmeans_init)
    for _ in range(_MAX_RESEEDS):
        similarities = _similarities(vectors, centroids, is_spherical=is_spherical)
        empty = np.setdiff1d(np.arange(count), similarities.argmax(1))
        if not len(empty):
            break
        centroids[empty] = vectors[np.argsort(similarities.max(1), kind="stable")[: len(empty)]]
        centroids = _run_kmeans(vectors, count, seed, is_spherical=is_spherical, start=centroids)
    return centroids


def _run_kmeans(
    vectors: Float[np.ndarray, "N P"],
    count: int,
    seed: int,
    *,
    is_spherical: bool,
    kmeans_init: KmeansInit = "restarts",
    start: Float[np.ndarray, "K P"] | None = None,
) -> Float[np.ndarray, "K P"]:
    method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS if kmeans_init == "plusplus" else None
    solver = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=_ITERATIONS,
        nredo=_RESTARTS if kmeans_init == "restarts" and start is None else 1,
        spherical=is_spherical,
        seed=seed,
        min_points_per_centroid=1,
        **({} if method is None else {"init_method": method}),
    )
    solver.train(vectors, init_centroids=start)
    assert solver.centroids is not None, "training leaves centroids"
    return np.array(solver.centroids)


def _similarities(
    vectors: Float[np.ndarray, "N P"], centroids: Float[np.ndarray, "K P"], *, is_spherical: bool
) -> Float[np.ndarray, "N K"]:
    """The greater, the nearer."""
    products: Float[np.ndarray, "N K"] = vectors @ centroids.T
    return products if is_spherical else 2 * products - (centroids**2).sum(1) - (vectors**2).sum(1, keepdims=True)


def nearest_centroid(
    vectors: Float[np.ndarray, "*N P"], centroids: Float[np.ndarray, "K P"], *, is_spherical: bool = True
) -> np.ndarray:
    """The nearest centroid of each vector, counted from 0."""
    lengths = np.float32(0.0) if is_spherical else (centroids**2).sum(1) / 2
    nearest: np.ndarray = (vectors @ centroids.T - lengths).argmax(-1)
    return nearest
