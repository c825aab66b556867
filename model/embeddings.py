"""Embeddings: whitening, unit vectors, and labeled segments as examples.

A segment takes the category of the examples whose embeddings are most similar.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from pydantic import Field

from model.errors import ConfigError

_ROWS = 8192
"""Rows that are copied at once: a sample of features is large."""
_NEIGHBORS = 10
_TEMPERATURE = 0.1
"""A neighbor votes with exp(cosine similarity / temperature)."""
_SCALE = 127.0


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


CategoryId = Annotated[int, Field(ge=0, lt=2**31)]
"""Id of a category. JSON and NumPy have it in 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """A named class."""

    id: CategoryId
    name: str


@dataclass(frozen=True, kw_only=True)
class CategoryExamples:
    """Embeddings of labeled segments and their categories, things first."""

    categories: tuple[Category, ...]
    num_things: int
    """The first `num_things` categories are things."""
    counts: tuple[int, ...]
    """Number of examples of each category."""
    embeddings: str
    """Unit vectors times 127 as int8, in base64; the examples of the first category come first."""
    except_clusters: tuple[int, ...] = ()
    """Clusters whose segments have the name that a user gave the cluster."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_things <= len(self.categories):
            raise ConfigError(f"examples: {self.num_things} of {len(self.categories)} categories cannot be things")
        if len(self.counts) != len(self.categories) or min(self.counts, default=0) < 0:
            raise ConfigError(f"examples: {len(self.counts)} counts for {len(self.categories)} categories")
        try:
            size = len(base64.b64decode(self.embeddings, validate=True))
        except binascii.Error as error:
            raise ConfigError(f"examples: the embeddings are not base64: {error}") from error
        if not sum(self.counts) or not size or size % sum(self.counts):
            raise ConfigError(f"examples: {size} bytes of embeddings for {sum(self.counts)} examples")

    @property
    def embedding_dim(self) -> int:
        """Size of an embedding."""
        return int(self.vectors.shape[1])

    @cached_property
    def labels(self) -> Int[np.ndarray, "M"]:
        """Position in `categories`, for each example."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "M E"]:
        """The embeddings, as unit vectors."""
        values = np.frombuffer(base64.b64decode(self.embeddings), np.int8).astype(np.float32)
        return l2_normalize(values.reshape(len(self.labels), -1))

    def classify(self, embeddings: Float32[np.ndarray, "S E"], is_thing: Bool[np.ndarray, "S"]) -> Int[np.ndarray, "S"]:
        """Return the position of each segment's category; -1 for an embedding of zeros, or if no example fits.

        The ten most similar examples vote, things for things and stuff for stuff.
        """
        found = np.full(len(embeddings), -1, np.int64)
        labels = self.labels
        similarities = embeddings @ self.vectors.T
        allowed = (labels < self.num_things)[None] == is_thing[:, None]
        for row in np.flatnonzero(embeddings.any(1) & allowed.any(1)):
            candidates = np.flatnonzero(allowed[row])
            cosines = similarities[row, candidates]
            nearest = np.argsort(-cosines, kind="stable")[:_NEIGHBORS]
            votes = np.exp((cosines[nearest] - cosines[nearest[0]]) / _TEMPERATURE)
            found[row] = np.bincount(labels[candidates[nearest]], votes).argmax()
        return found


def make_examples(
    categories: Sequence[Category],
    num_things: int,
    labels: Int[np.ndarray, "M"],
    embeddings: Float32[np.ndarray, "M E"],
) -> CategoryExamples:
    """Store embeddings (unit vectors); those of zeros are left out. Raises ConfigError if none is left."""
    order = np.argsort(labels, kind="stable")
    order = order[embeddings[order].any(1)]
    return CategoryExamples(
        categories=tuple(categories),
        num_things=num_things,
        counts=tuple(np.bincount(labels[order], minlength=len(categories)).tolist()),
        embeddings=base64.b64encode(np.round(embeddings[order] * _SCALE).astype(np.int8).tobytes()).decode("ascii"),
    )
