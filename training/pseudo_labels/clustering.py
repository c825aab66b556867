"""Fits a codebook on photos and their masks: PCA whitening, stuff clusters, thing clusters, objectness."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import faiss
import numpy as np
from jaxtyping import Float, Float32

from model.embeddings import fit_whitening
from model.errors import ConfigError
from model.progress import track
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureStore, PhotoFeatures
from training.data.label_config import (
    MAX_OBJECTS,
    STEGO_PRESETS,
    CodebookConfig,
    MaskDiscoveryConfig,
    PseudoLabelConfig,
)
from training.data.photos import PhotoFile, spread
from training.pseudo_labels.codebook import Codebook, nearest_centroid, smooth_with_masks, whiten
from training.pseudo_labels.consensus import HALF_WHITENED_DIM, FeatureProjections
from training.pseudo_labels.maskcut import MaskProposals, load_proposals, maskcut
from training.pseudo_labels.stego import train_stego

_SAMPLED_TOKENS = 200_000
_MAX_MASKS_PER_CLUSTER = 256
"""Vectors per cluster that k-means uses; more masks are not kept."""
_MIN_KEPT_MASKS = 65_536
_PHOTO_SUBSET = 1000
"""Photos for steps that need another pass over them."""
_PATCH_CLUSTERS = 128
_MIN_TOKENS_PER_CLUSTER = 8
_ITERATIONS = 50
_RESTARTS = 5
_MAX_RESEEDS = 3


@dataclass(frozen=True, kw_only=True)
class CodebookInputs:
    """The photos that a codebook is fitted on, with their cached features and stored masks."""

    config: PseudoLabelConfig
    photos: Sequence[PhotoFile]
    features: FeatureStore
    dataset: PseudoLabelDataset

    def load(self, stage: str, max_photos: int | None = None) -> Iterator[tuple[PhotoFeatures, MaskProposals]]:
        """Load photos one after the other, with progress: all, or at most so many, evenly spread."""
        for photo in track(spread(self.photos, max_photos or len(self.photos)), stage):
            yield self.features.load(photo), load_proposals(self.dataset.proposals(photo.digest))


def fit_codebook(inputs: CodebookInputs) -> Codebook:
    """Fit whitening and stuff clusters on a sample of all patches, thing clusters on one vector per mask."""
    config = CodebookConfig(**{each.name: getattr(inputs.config, each.name) for each in fields(CodebookConfig)})
    tokens = (inputs.features.load(photo).concat_layers() for photo in track(inputs.photos, "sample"))
    sample = _sample(tokens, len(inputs.photos), config.seed)
    mean, projection = fit_whitening(sample, config.pca_dim)
    codebook = Codebook(
        config=config,
        mean=mean,
        projection=projection,
        thing_centroids=np.zeros((0, 0), np.float32),
        stuff_centroids=np.zeros((0, 0), np.float32),
        stuff_in_masks=np.zeros(config.stuff_clusters),
    )
    if inputs.config.proposals == "consensus":
        codebook = _fit_objectness(inputs, codebook, sample)
    match config.stuff:
        case "kmeans":
            vectors = whiten(sample, mean, projection)
            codebook = replace(codebook, stuff_centroids=kmeans(vectors, config.stuff_clusters, config.seed))
        case "regions":
            del sample
            vectors = _sample_regions(inputs, codebook)
            codebook = replace(codebook, stuff_centroids=kmeans(vectors, config.stuff_clusters, config.seed))
        case "stego":
            del sample
            codebook = _fit_stego(inputs, codebook)
    return _fit_things(inputs, codebook)


def fit_projections(photos: Sequence[PhotoFile], features: FeatureStore, seed: int) -> FeatureProjections:
    """Fit the projections of consensus masks on an equal number of tokens of each photo.

    Raises ConfigError if there are too few tokens.
    """
    tokens = (features.load(photo).final_tokens() for photo in track(photos, "projections"))
    sample = _sample(tokens, len(photos), seed)
    mean, projection = fit_whitening(sample, min(HALF_WHITENED_DIM, sample.shape[1]))
    return FeatureProjections(mean=mean, projection=projection.astype(np.float32))


def kmeans(vectors: Float[np.ndarray, "N P"], count: int, seed: int) -> Float[np.ndarray, "K P"]:
    """Return the centroids of spherical k-means, of unit length: the best of five random starts.

    faiss uses at most 256 vectors per cluster, and splits a large cluster where one is empty. Clusters that are still
    empty at the end, as with many identical vectors, are seeded again at the vectors farthest from their centroids.
    Raises ConfigError if there are fewer vectors than clusters.
    """
    if len(vectors) < count:
        raise ConfigError(f"{len(vectors)} vectors cannot make {count} clusters: label more photos or ask for fewer")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    settings = {"niter": _ITERATIONS, "spherical": True, "seed": seed, "min_points_per_centroid": 1}
    centroids: Float[np.ndarray, "K P"] | None = None
    for reseeds in range(_MAX_RESEEDS + 1):
        solver = faiss.Kmeans(vectors.shape[1], count, nredo=1 if reseeds else _RESTARTS, **settings)
        solver.train(vectors, init_centroids=centroids)
        centroids = np.array(solver.centroids)
        similarities = vectors @ centroids.T
        empty = np.setdiff1d(np.arange(count), similarities.argmax(1))
        if not len(empty) or reseeds == _MAX_RESEEDS:
            break
        centroids[empty] = vectors[np.argsort(similarities.max(1), kind="stable")[: len(empty)]]
    assert centroids is not None
    return centroids


def fit_score_thresholds(scores: Sequence[Float[np.ndarray, "N"]]) -> Float[np.ndarray, "M"]:
    """Return the scores that leave 1, 2, … masks per photo on average, up to the maximum per photo."""
    ranked = np.sort(np.concatenate(scores))[::-1]
    if not len(ranked):
        return np.zeros(MAX_OBJECTS)
    indices = np.arange(1, 1 + MAX_OBJECTS) * len(scores) - 1
    thresholds: Float[np.ndarray, "M"] = ranked[np.minimum(indices, len(ranked) - 1)]
    return thresholds


def _fit_objectness(inputs: CodebookInputs, codebook: Codebook, sample: Float32[np.ndarray, "N E"]) -> Codebook:
    """Fit patch clusters, the fraction of each that MaskCut takes for objects, and thresholds for their scores."""
    whitened = whiten(sample, codebook.mean, codebook.projection)
    count = min(_PATCH_CLUSTERS, max(1, len(whitened) // _MIN_TOKENS_PER_CLUSTER))
    centroids = kmeans(whitened, count, codebook.config.seed)
    counts = np.zeros((2, len(centroids)), np.int64)
    for features, _ in inputs.load("objectness", _PHOTO_SUBSET):
        clusters = nearest_centroid(codebook.whiten(features), centroids)
        is_object = np.logical_or.reduce(maskcut(features.final_tokens(), MaskDiscoveryConfig()), axis=0)
        counts[0] += np.bincount(clusters.ravel(), minlength=len(centroids))
        counts[1] += np.bincount(clusters[is_object], minlength=len(centroids))
    codebook = replace(codebook, patch_centroids=centroids, patch_objectness=counts[1] / np.maximum(counts[0], 1))
    subset = inputs.load("score thresholds", _PHOTO_SUBSET)
    scores = [codebook.rank_by_objectness(*loaded).scores for loaded in subset]
    return replace(codebook, score_thresholds=fit_score_thresholds(scores))


def _sample(tokens: Iterable[Float[np.ndarray, "h w E"]], photos: int, seed: int) -> Float[np.ndarray, "N E"]:
    """Return an equal number of tokens of each photo."""
    generator = np.random.default_rng(seed)
    count, filled = max(1, _SAMPLED_TOKENS // photos), 0
    sample: Float[np.ndarray, "N E"] = np.zeros((0, 0))
    for each in tokens:
        flat = each.reshape(-1, each.shape[-1])
        if not filled:
            sample = np.empty((count * photos, flat.shape[1]), flat.dtype)
        chosen = flat[generator.permutation(len(flat))[:count]]
        sample[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
    return sample[:filled]


def _sample_regions(inputs: CodebookInputs, codebook: Codebook) -> Float[np.ndarray, "N P"]:
    """Return smoothed tokens of a subset of the photos."""
    smoothed = (
        smooth_with_masks(codebook.whiten(features), proposals)
        for features, proposals in inputs.load("regions", _PHOTO_SUBSET)
    )
    return _sample(smoothed, min(_PHOTO_SUBSET, len(inputs.photos)), codebook.config.seed)


def _fit_stego(inputs: CodebookInputs, codebook: Codebook) -> Codebook:
    config = codebook.config
    head, centroids = train_stego(
        inputs.photos,
        lambda photo: inputs.features.load(photo).final_tokens(),
        config.stuff_clusters,
        replace(STEGO_PRESETS[config.stego_preset], max_steps=config.stego_steps),
        config.seed,
        inputs.dataset.folder / "stego.safetensors",
    )
    weights = {name: tensor.numpy() for name, tensor in head.state_dict().items()}
    return replace(codebook, stuff_centroids=centroids, stego_head=weights)


def _fit_things(inputs: CodebookInputs, codebook: Codebook) -> Codebook:
    """Fit thing clusters on a reservoir sample of mask embeddings, and count how much stuff lies in masks."""
    config = codebook.config
    generator = np.random.default_rng(config.seed)
    capacity, seen = max(_MIN_KEPT_MASKS, _MAX_MASKS_PER_CLUSTER * config.thing_clusters), 0
    vectors: list[Float[np.ndarray, "D"]] = []
    counts = np.zeros((2, config.stuff_clusters + 1), np.int64)
    for features, proposals in inputs.load("mask embeddings"):
        masks = codebook.select_things(features, proposals, inputs.config.objects_per_image).binary
        for vector in codebook.embed_masks(features, masks):
            seen += 1
            if len(vectors) < capacity:
                vectors.append(vector)
            elif (index := int(generator.integers(seen))) < capacity:
                vectors[index] = vector
        stuff = nearest_centroid(codebook.embed_stuff(features, proposals), codebook.stuff_centroids) + 1
        counts[0] += np.bincount(stuff.ravel(), minlength=counts.shape[1])
        counts[1] += np.bincount(stuff[masks.any(0)], minlength=counts.shape[1])
    if not vectors:
        raise ConfigError(f"{len(inputs.photos)} photos have no mask: label more photos")
    things = kmeans(np.array(vectors, np.float32), config.thing_clusters, config.seed)
    total, inside = counts[:, 1:]
    return replace(codebook, thing_centroids=things, stuff_in_masks=inside / np.maximum(total, 1))
