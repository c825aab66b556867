"""STEGO: codes for patches, similar where features are, and their clusters (Hamilton et al., ICLR 2022).

Trained on cached features; the encoder does not run. Source: mhamilton723/STEGO, src/modules.py and
src/train_segmentation.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from model.embeddings import l2_normalize
from model.errors import ConfigError
from model.progress import Progress, track
from training.data.label_config import CorrelationTerm, StegoConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.codebook import StegoHead
from training.trainer.checkpoint import load_checkpoint, read_checkpoint_metadata, write_checkpoint

CROPS = 5
_MAX_PHOTOS = 5000
"""Photos among which neighbors are searched, so that memory does not grow with their number."""
_MIN_GRID = 2
_EPSILON = 1e-10

TokenLoader = Callable[[PhotoFile], Float[np.ndarray, "h w C"]]
"""Returns the encoder's output tokens of a photo."""


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Features of a batch of images and their codes."""

    features: Float[Tensor, "B C h w"]
    codes: Float[Tensor, "B D h w"]

    def sample(self, coords: Float[Tensor, "B p q 2"]) -> "FeatureBatch":
        return FeatureBatch(features=sample_features(self.features, coords), codes=sample_features(self.codes, coords))

    def shuffle(self, order: Int[Tensor, "B"]) -> "FeatureBatch":
        return FeatureBatch(features=self.features[order], codes=self.codes[order])


def train_stego(
    photos: Sequence[PhotoFile], tokens: TokenLoader, clusters: int, config: StegoConfig, seed: int, checkpoint: Path
) -> tuple[StegoHead, Float[np.ndarray, "S D"]]:
    """Train STEGO with its published losses on five crops of every photo, each half the size.

    Returns the head in evaluation mode, and the clusters' centroids, of unit length.

    Differences to the public code: crops are windows of the cached tokens (there, of the photo, which the encoder then
    sees at twice the size), the grid is that of our encoder, and the last step is used: no labels select a checkpoint.
    Continues from `checkpoint` if it exists; raises ConfigError if that has other settings.
    """
    trainer = StegoTrainer(photos, tokens, clusters, config, seed)
    optimizer = Adam([
        {"params": list(trainer.head.parameters()), "lr": config.learning_rate},
        {"params": list(trainer.probe.parameters()), "lr": config.probe_learning_rate},
    ])  # fmt: skip
    facts = {"stego": asdict(config), "clusters": clusters, "seed": seed, "photos": len(photos)}
    step = 0
    if checkpoint.is_file():
        stored = read_checkpoint_metadata(checkpoint)
        step = int(stored.pop("step"))
        if stored != facts:
            raise ConfigError(f"{checkpoint} has other settings: delete it, or choose another --out")
        load_checkpoint(checkpoint, trainer, optimizer)
    with Progress("stego", config.max_steps, unit="step", done=step) as progress:
        while step < config.max_steps:
            losses = trainer.train_step(step, optimizer)
            step += 1
            progress.advance(note=", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            if step % config.checkpoint_interval == 0 or step == config.max_steps:
                write_checkpoint(checkpoint, trainer, optimizer, facts | {"step": step})
    centroids = functional.normalize(trainer.probe.centroids.detach(), dim=1)
    return trainer.head.eval().requires_grad_(False), centroids.numpy()


class StegoTrainer(nn.Module):
    """Head, cluster probe and the crops that they are trained on."""

    def __init__(
        self, photos: Sequence[PhotoFile], tokens: TokenLoader, clusters: int, config: StegoConfig, seed: int
    ) -> None:
        """Raises ConfigError if there are too few photos."""
        super().__init__()
        stride = -(-len(photos) // _MAX_PHOTOS)
        self._photos = photos[::stride]
        self._tokens = tokens
        self._config = config
        self._seed = seed
        first = tokens(photos[0])
        self._width, self._grid = first.shape[2], max(_MIN_GRID, max(first.shape[:2]) // 2)
        torch.manual_seed(seed)
        self.head = StegoHead(self._width, config.code_dim, config.dropout)
        self.probe = ClusterProbe(clusters, config.code_dim)
        self._neighbors = self._find_neighbors()

    def train_step(self, step: int, optimizer: Adam) -> dict[str, float]:
        """Run one step; its randomness depends only on the seed and `step`."""
        config, size = self._config, self._config.batch_size
        torch.manual_seed(self._seed * 1_000_003 + step)
        crops = torch.randint(len(self._neighbors), (size,))
        ranks = torch.randint(self._neighbors.shape[1], (size,))
        near = [int(self._neighbors[crop, rank]) for crop, rank in zip(crops, ranks, strict=True)]
        images, neighbors = self._load_batch(crops.tolist()), self._load_batch(near)
        shuffles = torch.stack([sample_shuffle(size) for _ in range(config.num_shuffles)])
        losses = correlation_losses(
            images, neighbors, tuple(torch.rand(2, size, config.samples, config.samples, 2) * 2 - 1), shuffles, config
        )
        total, probe = weigh(losses, config), self.probe(images.codes)
        optimizer.zero_grad(set_to_none=True)
        (total + probe).backward()
        optimizer.step()
        return {"stego": total.item(), "probe": probe.item()}

    def _load_batch(self, crops: Sequence[int]) -> FeatureBatch:
        stacked = torch.stack([self._load_crop(crop) for crop in crops])
        # As in the public code, dropout also applies to the features that the losses compare.
        return FeatureBatch(features=self.head.dropout(stacked), codes=self.head(stacked))

    def _load_crop(self, crop: int) -> Float[Tensor, "C g g"]:
        photo, position = divmod(crop, CROPS)
        window = torch.from_numpy(crop_tokens(self._tokens(self._photos[photo]), position)).permute(2, 0, 1)
        size = (self._grid, self._grid)
        return functional.interpolate(window[None], size=size, mode="bilinear", align_corners=False)[0]

    def _find_neighbors(self) -> Int[np.ndarray, "N k"]:
        means = np.empty((CROPS * len(self._photos), self._width), np.float32)
        for index, photo in enumerate(track(self._photos, "neighbors")):
            tokens = self._tokens(photo)
            for position in range(CROPS):
                means[CROPS * index + position] = crop_tokens(tokens, position).mean((0, 1))
        return nearest_neighbors(means, self._config.num_neighbors)


class ClusterProbe(nn.Module):
    """Centroids trained on detached codes: spherical k-means by gradient descent."""

    def __init__(self, clusters: int, code_dim: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(clusters, code_dim))

    def forward(self, codes: Float[Tensor, "B D h w"]) -> Float[Tensor, ""]:
        """Return minus the mean cosine similarity between a code and its nearest centroid."""
        return -self.similarities(codes.detach()).amax(1).mean()

    def similarities(self, codes: Float[Tensor, "B D h w"]) -> Float[Tensor, "B S h w"]:
        """Return cosine similarities to the centroids."""
        centroids = functional.normalize(self.centroids, dim=1)
        return torch.einsum("bdhw,sd->bshw", functional.normalize(codes, dim=1), centroids)


def correlation_losses(
    images: FeatureBatch,
    neighbors: FeatureBatch,
    coords: tuple[Float[Tensor, "B p q 2"], Float[Tensor, "B p q 2"]],
    shuffles: Int[Tensor, "n B"],
    config: StegoConfig,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the losses of section 3.3 of the paper, as its public code computes them, before weighting.

    They compare an image with itself, with a nearest neighbor, and with random images (the mean over the shuffles).
    `coords` are sample points in both images of a pair: x and y in -1..1.
    """
    first, second = coords
    sampled = images.sample(first)
    others = [images.shuffle(order).sample(second) for order in shuffles]
    return (
        correlation_loss(sampled, sampled, config.self_term),
        correlation_loss(sampled, neighbors.sample(second), config.knn_term),
        torch.stack([correlation_loss(sampled, other, config.random_term) for other in others]).mean(),
    )


def weigh(losses: Sequence[Float[Tensor, ""]], config: StegoConfig) -> Float[Tensor, ""]:
    """Return the weighted sum of `correlation_losses`."""
    terms = (config.self_term, config.knn_term, config.random_term)
    return torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum()


def correlation_loss(one: FeatureBatch, other: FeatureBatch, term: CorrelationTerm) -> Float[Tensor, ""]:
    """Return minus the mean of (feature similarity - shift) times code similarity, over all pairs of points.

    The mean over the second image is subtracted from the feature similarities, so that large objects do not dominate;
    negative code similarities are ignored: codes are pushed apart until they are orthogonal.
    """
    with torch.no_grad():
        target = _cosines(one.features, other.features)
        mean = target.mean()
        target = target - target.mean((3, 4), keepdim=True)
        target = target - target.mean() + mean
    return -(_cosines(one.codes, other.codes).clamp(min=0.0) * (target - term.shift)).mean()


def sample_shuffle(count: int) -> Int[Tensor, "B"]:
    """Return a random order; an image that would be paired with itself gets the next one, as in the public code."""
    order = torch.randperm(count)
    order[order == torch.arange(count)] += 1
    return order % count


def sample_features(maps: Float[Tensor, "B C h w"], coords: Float[Tensor, "B p q 2"]) -> Float[Tensor, "B C q p"]:
    """Sample bilinearly; -1 and 1 are the centers of the outermost pixels.

    The axes of the grid are swapped, as in the public code.
    """
    return functional.grid_sample(maps, coords.permute(0, 2, 1, 3), padding_mode="border", align_corners=True)


def crop_tokens(tokens: Float[np.ndarray, "h w C"], position: int) -> Float[np.ndarray, "a b C"]:
    """Return a crop of half the height and width: position 0 to 3 are the corners, 4 is the center."""
    height, width = (max(1, length // 2) for length in tokens.shape[:2])
    down, right = tokens.shape[0] - height, tokens.shape[1] - width
    top, left = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))[position]
    return tokens[top : top + height, left : left + width]


def nearest_neighbors(vectors: Float[np.ndarray, "N C"], count: int) -> Int[np.ndarray, "N k"]:
    """Return the indices of the nearest other vectors of each vector by cosine similarity, nearest first.

    Raises ConfigError if there are no more than `count` vectors.
    """
    if len(vectors) <= count:
        raise ConfigError(f"{len(vectors)} crops cannot have {count} neighbors each: label more photos")
    unit = l2_normalize(vectors)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    found = index.search(unit, count + 1)[1]
    # An identical vector may come before the vector itself: remove it wherever it is, else remove the last neighbor.
    is_other = found != np.arange(len(found))[:, None]
    is_other[is_other.all(1), -1] = False
    others: Int[np.ndarray, "N k"] = found[is_other].reshape(len(found), count)
    return others


def _cosines(one: Float[Tensor, "B C h w"], other: Float[Tensor, "B C i j"]) -> Float[Tensor, "B h w i j"]:
    one, other = (functional.normalize(each, dim=1, eps=_EPSILON) for each in (one, other))
    return torch.einsum("bchw,bcij->bhwij", one, other)
