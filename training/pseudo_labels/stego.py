"""STEGO: a small code for every patch, alike where features are (Hamilton et al., ICLR 2022; mhamilton723/STEGO)."""

import logging
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

from model.errors import ConfigError
from training.data.label_config import CorrelationTerm, StegoConfig
from training.data.photos import PhotoFile
from training.progress import Progress, track
from training.trainer.checkpoint import load_checkpoint, read_facts, write_checkpoint

_MAX_CODE_SIMILARITY = 0.8
_EPSILON = 1e-10


class StegoHead(nn.Module):
    """Features to codes: a linear and a two-layer branch, added; 1x1 convolutions, so any grid will do."""

    def __init__(self, width: int, dimensions: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Conv2d(width, dimensions, 1)
        self.bend = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, dimensions, 1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Each branch drops channels of its own."""
        codes: Tensor = self.linear(self.dropout(features)) + self.bend(self.dropout(features))
        return codes


class ClusterProbe(nn.Module):
    """Centroids learnt beside the codes, which they do not touch: a spherical k-means by gradient."""

    def __init__(self, clusters: int, dimensions: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(clusters, dimensions))

    def forward(self, codes: Float[Tensor, "B D h w"]) -> Float[Tensor, ""]:
        """Minus the mean cosine between a code and its nearest centroid."""
        return -self.similarities(codes.detach()).amax(1).mean()

    def similarities(self, codes: Float[Tensor, "B D h w"]) -> Float[Tensor, "B S h w"]:
        """Cosines."""
        centroids = functional.normalize(self.centroids, dim=1)
        return torch.einsum("bdhw,sd->bshw", functional.normalize(codes, dim=1), centroids)


@dataclass(frozen=True, kw_only=True)
class SampleCoords:
    """Where two pictures of a pair are looked at: x and y in -1..1."""

    first: Float[Tensor, "B p q 2"]
    second: Float[Tensor, "B p q 2"]


@dataclass(frozen=True, kw_only=True)
class CorrelationLosses:
    """The three losses before their weights."""

    itself: Float[Tensor, ""]
    neighbour: Float[Tensor, ""]
    stranger: Float[Tensor, ""]
    """The mean over the shuffles."""

    def weigh(self, config: StegoConfig) -> Float[Tensor, ""]:
        """The sum that is minimised."""
        return (
            config.itself.weight * self.itself
            + config.neighbour.weight * self.neighbour
            + config.stranger.weight * self.stranger
        )


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Features of some pictures and their codes."""

    features: Float[Tensor, "B C h w"]
    codes: Float[Tensor, "B D h w"]

    def look(self, points: Float[Tensor, "B p q 2"]) -> "FeatureBatch":
        return FeatureBatch(features=sample_features(self.features, points), codes=sample_features(self.codes, points))

    def shuffle(self, order: Int[Tensor, "B"]) -> "FeatureBatch":
        return FeatureBatch(features=self.features[order], codes=self.codes[order])


def sample_coords(count: int, samples: int) -> SampleCoords:
    """Uniform over the pictures."""
    first, second = torch.rand(2, count, samples, samples, 2) * 2 - 1
    return SampleCoords(first=first, second=second)


def sample_shuffle(count: int) -> Int[Tensor, "B"]:
    """A random order; a picture that would meet itself meets the next one, as in the public code."""
    order = torch.randperm(count)
    order[order == torch.arange(count)] += 1
    return order % count


def correlation_losses(
    pictures: FeatureBatch,
    neighbours: FeatureBatch,
    points: SampleCoords,
    shuffles: Int[Tensor, "n B"],
    config: StegoConfig,
) -> CorrelationLosses:
    """Section 3.3 of the paper, as its public code computes it."""
    here = pictures.look(points.first)
    strangers = [pictures.shuffle(order).look(points.second) for order in shuffles]
    return CorrelationLosses(
        itself=correlation_loss(here, here, config.itself, config),
        neighbour=correlation_loss(here, neighbours.look(points.second), config.neighbour, config),
        stranger=torch.stack([correlation_loss(here, other, config.stranger, config) for other in strangers]).mean(),
    )


def correlation_loss(
    one: FeatureBatch, other: FeatureBatch, term: CorrelationTerm, config: StegoConfig
) -> Float[Tensor, ""]:
    """Minus the mean of feature similarity above the shift times code similarity, over all pairs of points."""
    with torch.no_grad():
        wanted = _cosines(one.features, other.features)
        if config.is_centred:
            mean = wanted.mean()
            wanted = wanted - wanted.mean((3, 4), keepdim=True)
            wanted = wanted - wanted.mean() + mean
    found = _cosines(one.codes, other.codes)
    least = 0.0 if config.is_clamped else None
    if config.is_clamped or config.is_capped:
        found = found.clamp(least, _MAX_CODE_SIMILARITY if config.is_capped else None)
    return -(found * (wanted - term.shift)).mean()


def sample_features(maps: Float[Tensor, "B C h w"], points: Float[Tensor, "B p q 2"]) -> Float[Tensor, "B C q p"]:
    """Bilinear; -1 and 1 are the centres of the outermost cells. The axes of the grid come out exchanged, as there."""
    return functional.grid_sample(maps, points.permute(0, 2, 1, 3), padding_mode="border", align_corners=True)


def _cosines(one: Float[Tensor, "B C h w"], other: Float[Tensor, "B C i j"]) -> Float[Tensor, "B h w i j"]:
    one, other = (functional.normalize(each, dim=1, eps=_EPSILON) for each in (one, other))
    return torch.einsum("bchw,bcij->bhwij", one, other)


logger = logging.getLogger(__name__)

CROPS = 5
_MAX_PHOTOS = 5000
"""That pairs are found among: what is kept of a photo does not grow with their number."""
_MIN_GRID = 2
TokenLoader = Callable[[PhotoFile], Float[np.ndarray, "h w C"]]
"""The encoder's output tokens of a photo."""


@dataclass(frozen=True, kw_only=True)
class TrainedStego:
    """What training leaves."""

    head: StegoHead
    centroids: Float[np.ndarray, "S D"]
    """Of unit length."""


class StegoTrainer(nn.Module):
    """Head and probe, and the crops they learn from."""

    def __init__(
        self, photos: Sequence[PhotoFile], tokens: TokenLoader, clusters: int, config: StegoConfig, seed: int
    ) -> None:
        """Raises ConfigError if there are too few photos for neighbours."""
        super().__init__()
        step = -(-len(photos) // _MAX_PHOTOS)
        self._photos = photos[::step]
        self._tokens = tokens
        self._config = config
        self._seed = seed
        first = tokens(photos[0])
        self._width, self._grid = first.shape[2], max(_MIN_GRID, max(first.shape[:2]) // 2)
        torch.manual_seed(seed)
        self.head = StegoHead(self._width, config.dimensions, config.dropout)
        self.probe = ClusterProbe(clusters, config.dimensions)
        self._neighbours = self._find_neighbours()

    def advance(self, step: int, optimiser: Adam) -> dict[str, float]:
        """One step, the same whenever it is done: its draws depend on the seed and its number alone."""
        config = self._config
        torch.manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.randint(len(self._neighbours), (config.batch,))
        places = torch.randint(self._neighbours.shape[1], (config.batch,))
        near = [int(self._neighbours[one, place]) for one, place in zip(chosen, places, strict=True)]
        pictures, neighbours = self._embed(chosen.tolist()), self._embed(near)
        shuffles = torch.stack([sample_shuffle(config.batch) for _ in range(config.shuffles)])
        losses = correlation_losses(pictures, neighbours, sample_coords(config.batch, config.samples), shuffles, config)
        total, probe = losses.weigh(config), self.probe(pictures.codes)
        optimiser.zero_grad(set_to_none=True)
        (total + probe).backward()
        optimiser.step()
        return {"stego": total.item(), "probe": probe.item()}

    def finish(self) -> TrainedStego:
        """Head and centroids for use."""
        centroids = functional.normalize(self.probe.centroids.detach(), dim=1)
        return TrainedStego(head=self.head.eval().requires_grad_(False), centroids=centroids.numpy())

    def group(self) -> list[dict[str, object]]:
        """For the optimiser."""
        config = self._config
        return [
            {"params": list(self.head.parameters()), "lr": config.learning_rate},
            {"params": list(self.probe.parameters()), "lr": config.probe_learning_rate},
        ]

    def _embed(self, crops: Sequence[int]) -> FeatureBatch:
        stacked = torch.stack([self._read_crop(number) for number in crops])
        # As in the public code, what is compared has lost channels, too.
        return FeatureBatch(features=self.head.dropout(stacked), codes=self.head(stacked))

    def _read_crop(self, number: int) -> Float[Tensor, "C g g"]:
        photo, place = divmod(number, CROPS)
        window = torch.from_numpy(crop_tokens(self._tokens(self._photos[photo]), place)).permute(2, 0, 1)
        size = (self._grid, self._grid)
        return functional.interpolate(window[None], size=size, mode="bilinear", align_corners=False)[0]

    def _find_neighbours(self) -> Int[np.ndarray, "N k"]:
        means = np.empty((CROPS * len(self._photos), self._width), np.float32)
        for index, photo in enumerate(track(self._photos, "neighbours")):
            tokens = self._tokens(photo)
            for place in range(CROPS):
                means[CROPS * index + place] = crop_tokens(tokens, place).mean((0, 1))
        return nearest_neighbors(means, self._config.neighbours)


def train_stego(
    photos: Sequence[PhotoFile], tokens: TokenLoader, clusters: int, config: StegoConfig, seed: int, checkpoint: Path
) -> TrainedStego:
    """STEGO with its published losses, on the five half-sized crops of every photo.

    Unlike the public code: crops are windows of the cached tokens (there, of the photo, which the encoder then sees at
    twice the size), the grid is that of our encoder, and the last step is taken: no label chooses a checkpoint.
    Goes on from `checkpoint` if it is there; raises ConfigError if that was begun otherwise.
    """
    fit = StegoTrainer(photos, tokens, clusters, config, seed)
    optimiser = Adam(fit.group())
    facts = {"stego": asdict(config), "clusters": clusters, "seed": seed, "photos": len(photos)}
    step = 0
    if checkpoint.is_file():
        stored = read_facts(checkpoint)
        step = int(stored.pop("step"))
        if stored != facts:
            raise ConfigError(f"{checkpoint} was begun with other settings: delete it, or choose another --out")
        load_checkpoint(checkpoint, fit, optimiser)
    with Progress("stego", config.steps, unit="step", done=step) as progress:
        while step < config.steps:
            losses = fit.advance(step, optimiser)
            step += 1
            progress.advance(note=", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            if step % config.checkpoint_every == 0 or step == config.steps:
                write_checkpoint(checkpoint, fit, optimiser, facts | {"step": step})
    return fit.finish()


def crop_tokens(tokens: Float[np.ndarray, "h w C"], place: int) -> Float[np.ndarray, "a b C"]:
    """Half as high and wide: of the four corners and the middle, in this order."""
    height, width = (max(1, length // 2) for length in tokens.shape[:2])
    down, right = tokens.shape[0] - height, tokens.shape[1] - width
    top, left = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))[place]
    return tokens[top : top + height, left : left + width]


def nearest_neighbors(vectors: Float[np.ndarray, "N C"], count: int) -> Int[np.ndarray, "N k"]:
    """The nearest others of every vector by angle, nearest first.

    Raises ConfigError if there are no more than `count` vectors.
    """
    if len(vectors) <= count:
        raise ConfigError(f"{len(vectors)} crops have no {count} neighbours each: label more photos")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    found = index.search(unit, count + 1)[1]
    # A vector's twin may come before itself: take the vector out wherever it stands, else the last.
    is_other = found != np.arange(len(found))[:, None]
    is_other[is_other.all(1), -1] = False
    others: Int[np.ndarray, "N k"] = found[is_other].reshape(len(found), count)
    return others
