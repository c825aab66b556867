"""Scored boxes to a fixed number of detections."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.errors import ConfigError
from model.network.proposals import pick
from model.network.suppression import suppress


@dataclass(frozen=True, kw_only=True)
class DetectionLimits:
    """How many detections are kept, and which."""

    score: float = 0.05
    """Pairs of box and cluster must score above; 0..1."""
    overlap: float = 0.5
    """Boxes of one cluster that overlap a better one beyond this IoU are dropped; 0..1."""
    candidates: int = 1000
    """Best pairs of box and cluster that are looked at; at least 1."""
    total: int = 100
    """Detections of a picture; at least 1."""
    sweeps: int = 16
    """See `suppress`; at least 1. The longest chain seen needs 15. Even, so as to keep a box too many and lose none."""

    def __post_init__(self) -> None:
        if min(self.candidates, self.total, self.sweeps) < 1 or not all(
            0.0 <= share <= 1.0 for share in (self.score, self.overlap)
        ):
            raise ConfigError(f"counts must be at least 1, the score and the overlap lie in 0..1, got {self}")


class Detections(NamedTuple):
    """A fixed number, best first; those unused come last, all zero."""

    scores: Float[Tensor, "B D"]
    clusters: Int[Tensor, "B D"]
    """Counted from 0."""
    boxes: Float[Tensor, "B D 4"]


def select_detections(
    probabilities: Float[Tensor, "B N K+1"],
    boxes: Float[Tensor, "B N 4"],
    is_used: Bool[Tensor, "B N"],
    limits: DetectionLimits,
) -> Detections:
    """The best pairs of box and cluster, suppressed within their cluster.

    As detectron2's `fast_rcnn_inference`, but static: suppression by sweeps, and only the best `limits.candidates`
    pairs take part. No pair is touched by a worse one, so that this changes nothing unless fewer than `limits.total` of
    them stay while pairs beyond them pass the score.
    """
    clusters = probabilities.shape[2] - 1
    scores = torch.where(is_used[..., None], probabilities[..., :-1], 0.0).flatten(1)
    scores = torch.where(scores > limits.score, scores, 0.0)
    scores, index = scores.topk(min(limits.candidates, scores.shape[1]), dim=1)
    chosen, cluster = pick(boxes, index // clusters), index % clusters
    keep = suppress(chosen, scores > 0.0, limits.overlap, limits.sweeps, cluster)
    scores, order = torch.where(keep, scores, 0.0).topk(min(limits.total, scores.shape[1]), dim=1)
    is_found = scores > 0.0
    missing = limits.total - scores.shape[1]
    return Detections(
        scores=functional.pad(scores, (0, missing)),
        clusters=functional.pad(torch.where(is_found, cluster.gather(1, order), 0), (0, missing)),
        boxes=functional.pad(torch.where(is_found[..., None], pick(chosen, order), 0.0), (0, 0, 0, missing)),
    )
