"""What objects look like to the encoder: the vectors that queries are taught, so that clusters can be made anew."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from training.fitting.transformer.data import Target
from training.labels.clusters.cluster import SEMANTIC_TAPS
from training.labels.clusters.codebook import read_codebook
from training.labels.store import LabelStore


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """A store's own, as its codebook has it."""

    mean: Float[Tensor, "E"]
    projection: Float[Tensor, "E P"]

    @classmethod
    def read(cls, store: LabelStore) -> Self:
        book = read_codebook(store.codebook)
        return cls(mean=torch.from_numpy(book.mean).float(), projection=torch.from_numpy(book.projection).float())

    @property
    def size(self) -> int:
        """Of a vector."""
        return self.projection.shape[1]

    @torch.no_grad()
    def describe(self, features: Float[Tensor, "T B N C"], targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """The targets with their vectors: the mean of the whitened patches under each mask, of unit length.

        As the label store's `RegionDescriber`, but that a patch counts by its share in the mask.
        """
        with torch.autocast(features.device.type, enabled=False):
            tokens = self._whiten(features.float())
        grid = round(tokens.shape[1] ** 0.5)
        described = []
        for target, patches in zip(targets, tokens, strict=True):
            shares = functional.adaptive_avg_pool2d(target.masks, grid).flatten(1)
            described.append(replace(target, vectors=functional.normalize(shares @ patches, dim=1)))
        return tuple(described)

    def _whiten(self, features: Float[Tensor, "T B N C"]) -> Float[Tensor, "B N P"]:
        blocks = [functional.layer_norm(features[tap], features.shape[-1:]) for tap in SEMANTIC_TAPS]
        mean, projection = (each.to(features.device) for each in (self.mean, self.projection))
        return functional.normalize(torch.cat(blocks, 2) @ projection - mean @ projection, dim=2)
