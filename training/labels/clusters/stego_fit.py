"""STEGO trained on cached features: the encoder never runs."""

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
from training.checkpoint import load_checkpoint, read_facts, write_checkpoint
from training.labels.clusters.stego import ClusterProbe, CodeHead, Pictures, correlate, draw_points, draw_shuffle
from training.labels.clusters.stego_recipe import StegoConfig
from training.photos import PhotoFile
from training.progress import Progress, show

logger = logging.getLogger(__name__)

CROPS = 5
_MOST_PHOTOS = 5000
"""That pairs are found among: what is kept of a photo does not grow with their number."""
_LEAST_SIDE = 2
Tokens = Callable[[PhotoFile], Float[np.ndarray, "h w C"]]
"""The encoder's output tokens of a photo."""


@dataclass(frozen=True, kw_only=True)
class Stego:
    """What training leaves."""

    head: CodeHead
    centroids: Float[np.ndarray, "S D"]
    """Of unit length."""


class StegoFit(nn.Module):
    """Head and probe, and the crops they learn from."""

    def __init__(
        self, photos: Sequence[PhotoFile], tokens: Tokens, clusters: int, config: StegoConfig, seed: int
    ) -> None:
        """Raises ConfigError if there are too few photos for neighbours."""
        super().__init__()
        step = -(-len(photos) // _MOST_PHOTOS)
        self._photos = photos[::step]
        self._tokens = tokens
        self._config = config
        self._seed = seed
        first = tokens(photos[0])
        self._width, self._grid = first.shape[2], max(_LEAST_SIDE, max(first.shape[:2]) // 2)
        torch.manual_seed(seed)
        self.head = CodeHead(self._width, config.dimensions, config.dropout)
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
        shuffles = torch.stack([draw_shuffle(config.batch) for _ in range(config.shuffles)])
        losses = correlate(pictures, neighbours, draw_points(config.batch, config.samples), shuffles, config)
        total, probe = losses.weigh(config), self.probe(pictures.codes)
        optimiser.zero_grad(set_to_none=True)
        (total + probe).backward()
        optimiser.step()
        return {"stego": total.item(), "probe": probe.item()}

    def finish(self) -> Stego:
        """Head and centroids for use."""
        centroids = functional.normalize(self.probe.centroids.detach(), dim=1)
        return Stego(head=self.head.eval().requires_grad_(False), centroids=centroids.numpy())

    def group(self) -> list[dict[str, object]]:
        """For the optimiser."""
        config = self._config
        return [
            {"params": list(self.head.parameters()), "lr": config.learning_rate},
            {"params": list(self.probe.parameters()), "lr": config.probe_learning_rate},
        ]

    def _embed(self, crops: Sequence[int]) -> Pictures:
        stacked = torch.stack([self._read_crop(number) for number in crops])
        # As in the public code, what is compared has lost channels, too.
        return Pictures(features=self.head.dropout(stacked), codes=self.head(stacked))

    def _read_crop(self, number: int) -> Float[Tensor, "C g g"]:
        photo, place = divmod(number, CROPS)
        window = torch.from_numpy(cut_crop(self._tokens(self._photos[photo]), place)).permute(2, 0, 1)
        size = (self._grid, self._grid)
        return functional.interpolate(window[None], size=size, mode="bilinear", align_corners=False)[0]

    def _find_neighbours(self) -> Int[np.ndarray, "N k"]:
        means = np.empty((CROPS * len(self._photos), self._width), np.float32)
        for index, photo in enumerate(show(self._photos, "neighbours")):
            tokens = self._tokens(photo)
            for place in range(CROPS):
                means[CROPS * index + place] = cut_crop(tokens, place).mean((0, 1))
        return find_neighbours(means, self._config.neighbours)


def train_stego(
    photos: Sequence[PhotoFile], tokens: Tokens, clusters: int, config: StegoConfig, seed: int, checkpoint: Path
) -> Stego:
    """STEGO with its published losses, on the five half-sized crops of every photo.

    Unlike the public code: crops are windows of the cached tokens (there, of the photo, which the encoder then sees at
    twice the size), the grid is that of our encoder, and the last step is taken: no label chooses a checkpoint.
    Goes on from `checkpoint` if it is there; raises ConfigError if that was begun otherwise.
    """
    fit = StegoFit(photos, tokens, clusters, config, seed)
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


def cut_crop(tokens: Float[np.ndarray, "h w C"], place: int) -> Float[np.ndarray, "a b C"]:
    """Half as high and wide: of the four corners and the middle, in this order."""
    height, width = (max(1, length // 2) for length in tokens.shape[:2])
    down, right = tokens.shape[0] - height, tokens.shape[1] - width
    top, left = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))[place]
    return tokens[top : top + height, left : left + width]


def find_neighbours(vectors: Float[np.ndarray, "N C"], count: int) -> Int[np.ndarray, "N k"]:
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
