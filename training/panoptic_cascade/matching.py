"""Assigns boxes to labels and samples the boxes that a loss is computed on."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.networks.boxes import box_area

_MIN_UNION = 1e-12
POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
"""Kinds of boxes."""


@dataclass(frozen=True, kw_only=True)
class CascadeTarget:
    """Labels of one photo, in pixels of the padded batch."""

    boxes: Float[Tensor, "M 4"]
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """0-based."""
    semantic: Int[Tensor, "H W"]
    """0 for things, s for stuff cluster s, else IGNORE_INDEX."""


class BoxMatches(NamedTuple):
    """The assignment of each box."""

    nearest: Int[Tensor, "N"]
    """Index of the instance with the highest IoU; 0 if there is no instance."""
    kind: Int[Tensor, "N"]
    """POSITIVE, NEGATIVE or IGNORED."""


def match_boxes(
    boxes: Float[Tensor, "N 4"],
    instances: Float[Tensor, "M 4"],
    low: float,
    high: float,
    *,
    allow_low_quality: bool = False,
) -> BoxMatches:
    """Assign each box to the instance with the highest IoU: positive from `high` on, negative below `low`.

    With `allow_low_quality`, the boxes with the highest IoU of each instance are positive, too (Faster R-CNN, section
    3.1.2; detectron2/modeling/matcher.py).
    """
    if not len(instances):
        zeros = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return BoxMatches(nearest=zeros, kind=zeros)
    ious = pairwise_box_iou(instances, boxes)
    best, nearest = ious.max(0)
    kind = torch.where(best >= high, POSITIVE, torch.where(best < low, NEGATIVE, IGNORED))
    if allow_low_quality:
        highest = ious.max(1, keepdim=True).values
        kind = torch.where(((ious == highest) & (highest > 0.0)).any(0), POSITIVE, kind)
    return BoxMatches(nearest=nearest, kind=kind)


def pairwise_box_iou(first: Float[Tensor, "N 4"], second: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """Return the IoU of all pairs of two sets of boxes; 0 where both are empty."""
    corner = torch.maximum(first[:, None, :2], second[:, :2])
    sides = (torch.minimum(first[:, None, 2:], second[:, 2:]) - corner).clamp(min=0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = box_area(first)[:, None] + box_area(second) - intersection
    return intersection / union.clamp(min=_MIN_UNION)


def subsample_labels(
    kind: Int[Tensor, "N"], num_samples: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Int[Tensor, "P"], Int[Tensor, "R"]]:
    """Sample positive boxes, at most this fraction of `num_samples`, and fill up with negative ones."""
    positive, negative = (torch.nonzero(kind == each)[:, 0] for each in (POSITIVE, NEGATIVE))
    positive = _shuffle(positive, generator)[: int(num_samples * positive_fraction)]
    return positive, _shuffle(negative, generator)[: num_samples - len(positive)]


def _shuffle(indices: Int[Tensor, "N"], generator: torch.Generator) -> Int[Tensor, "N"]:
    return indices[torch.randperm(len(indices), generator=generator, device=indices.device)]


def ignore_unlabeled(
    kind: Int[Tensor, "N"], boxes: Float[Tensor, "N 4"], unlabeled: Bool[Tensor, "H W"], max_fraction: float
) -> Int[Tensor, "N"]:
    """Change negative boxes to ignored ones if a larger fraction of their pixels is unlabeled."""
    if max_fraction >= 1.0:
        return kind
    is_unlabeled = covered_fraction(unlabeled, boxes) > max_fraction
    return torch.where((kind == NEGATIVE) & is_unlabeled, IGNORED, kind)


def covered_fraction(area: Bool[Tensor, "H W"], boxes: Float[Tensor, "N 4"]) -> Float[Tensor, "N"]:
    """Return the fraction of each box, clipped and rounded to pixels, that lies in the area; 0 for an empty box."""
    height, width = area.shape
    sums = torch.zeros(height + 1, width + 1, dtype=torch.int64, device=area.device)
    sums[1:, 1:] = area.long().cumsum(0).cumsum(1)
    limits = torch.tensor([width, height, width, height], device=boxes.device)
    x0, y0, x1, y1 = torch.minimum(boxes.round().long().clamp(min=0), limits).unbind(1)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0)).clamp(min=1)
