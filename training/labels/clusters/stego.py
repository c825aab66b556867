"""STEGO: a small code for every patch, alike where features are (Hamilton et al., ICLR 2022; mhamilton723/STEGO)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from training.labels.clusters.stego_recipe import StegoConfig, Term

_CAP = 0.8
_NO_LENGTH = 1e-10


class CodeHead(nn.Module):
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
        return -self.compare(codes.detach()).amax(1).mean()

    def compare(self, codes: Float[Tensor, "B D h w"]) -> Float[Tensor, "B S h w"]:
        """Cosines."""
        centroids = functional.normalize(self.centroids, dim=1)
        return torch.einsum("bdhw,sd->bshw", functional.normalize(codes, dim=1), centroids)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where two pictures of a pair are looked at: x and y in -1..1."""

    first: Float[Tensor, "B p q 2"]
    second: Float[Tensor, "B p q 2"]


@dataclass(frozen=True, kw_only=True)
class Correlations:
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
class Pictures:
    """Features of some pictures and their codes."""

    features: Float[Tensor, "B C h w"]
    codes: Float[Tensor, "B D h w"]

    def look(self, points: Float[Tensor, "B p q 2"]) -> "Pictures":
        return Pictures(features=sample(self.features, points), codes=sample(self.codes, points))

    def shuffle(self, order: Int[Tensor, "B"]) -> "Pictures":
        return Pictures(features=self.features[order], codes=self.codes[order])


def draw_points(count: int, samples: int) -> Points:
    """Uniform over the pictures."""
    first, second = torch.rand(2, count, samples, samples, 2) * 2 - 1
    return Points(first=first, second=second)


def draw_shuffle(count: int) -> Int[Tensor, "B"]:
    """A random order; a picture that would meet itself meets the next one, as in the public code."""
    order = torch.randperm(count)
    order[order == torch.arange(count)] += 1
    return order % count


def correlate(
    pictures: Pictures, neighbours: Pictures, points: Points, shuffles: Int[Tensor, "n B"], config: StegoConfig
) -> Correlations:
    """Section 3.3 of the paper, as its public code computes it."""
    here = pictures.look(points.first)
    strangers = [pictures.shuffle(order).look(points.second) for order in shuffles]
    return Correlations(
        itself=compare(here, here, config.itself, config),
        neighbour=compare(here, neighbours.look(points.second), config.neighbour, config),
        stranger=torch.stack([compare(here, other, config.stranger, config) for other in strangers]).mean(),
    )


def compare(one: Pictures, other: Pictures, term: Term, config: StegoConfig) -> Float[Tensor, ""]:
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
        found = found.clamp(least, _CAP if config.is_capped else None)
    return -(found * (wanted - term.shift)).mean()


def sample(maps: Float[Tensor, "B C h w"], points: Float[Tensor, "B p q 2"]) -> Float[Tensor, "B C q p"]:
    """Bilinear; -1 and 1 are the centres of the outermost cells. The axes of the grid come out exchanged, as there."""
    return functional.grid_sample(maps, points.permute(0, 2, 1, 3), padding_mode="border", align_corners=True)


def _cosines(one: Float[Tensor, "B C h w"], other: Float[Tensor, "B C i j"]) -> Float[Tensor, "B h w i j"]:
    one, other = (functional.normalize(each, dim=1, eps=_NO_LENGTH) for each in (one, other))
    return torch.einsum("bchw,bcij->bhwij", one, other)
