"""Which boxes are on which objects, and which of them a loss is measured on."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.networks.boxes import box_area

_LEAST_UNION = 1e-12


@dataclass(frozen=True, kw_only=True)
class CascadeTarget:
    """What one picture should be answered with, in pixels of the batch's canvas."""

    boxes: Float[Tensor, "M 4"]
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """Counted from 0."""
    semantic: Int[Tensor, "H W"]
    """0 things, s stuff cluster s, IGNORE elsewhere."""


class BoxMatches(NamedTuple):
    """For each box."""

    nearest: Int[Tensor, "N"]
    """Index of the object that it overlaps most; 0 if there is none."""
    kind: Int[Tensor, "N"]
    """1: on that object; 0: on nothing; -1: not to be judged."""


def match(
    boxes: Float[Tensor, "N 4"], objects: Float[Tensor, "M 4"], low: float, high: float, *, keeps_best: bool = False
) -> BoxMatches:
    """Boxes are on the object that they overlap by an IoU of `high` or more, on nothing below `low`.

    With `keeps_best` so are those that overlap an object as much as any does (Faster R-CNN, section 3.1.2;
    detectron2/modeling/matcher.py).
    """
    if not len(objects):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return BoxMatches(nearest=nothing, kind=nothing)
    overlaps = pairwise_box_iou(objects, boxes)
    best, nearest = overlaps.max(0)
    kind = torch.where(best >= high, 1, torch.where(best < low, 0, -1))
    if keeps_best:
        most = overlaps.max(1, keepdim=True).values
        kind = torch.where(((overlaps == most) & (most > 0.0)).any(0), 1, kind)
    return BoxMatches(nearest=nearest, kind=kind)


def pairwise_box_iou(first: Float[Tensor, "N 4"], second: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """Intersection over union of each of one set with each of another; 0 where both are empty."""
    corner = torch.maximum(first[:, None, :2], second[:, :2])
    sides = (torch.minimum(first[:, None, 2:], second[:, 2:]) - corner).clamp(min=0.0)
    inner = sides[..., 0] * sides[..., 1]
    union = box_area(first)[:, None] + box_area(second) - inner
    return inner / union.clamp(min=_LEAST_UNION)


def draw(
    kind: Int[Tensor, "N"], count: int, share: float, generator: torch.Generator
) -> tuple[Int[Tensor, "P"], Int[Tensor, "R"]]:
    """Boxes on objects, at most `share` of `count`, and on nothing, as many as are left and there are."""
    positive, negative = (torch.nonzero(kind == each)[:, 0] for each in (1, 0))
    positive = _shuffle(positive, generator)[: int(count * share)]
    return positive, _shuffle(negative, generator)[: count - len(positive)]


def _shuffle(index: Int[Tensor, "N"], generator: torch.Generator) -> Int[Tensor, "N"]:
    return index[torch.randperm(len(index), generator=generator, device=index.device)]


def ignore_unlabeled(
    kind: Int[Tensor, "N"], boxes: Float[Tensor, "N 4"], ignored: Bool[Tensor, "H W"], share: float
) -> Int[Tensor, "N"]:
    """Boxes on nothing are not to be judged if more than `share` of them lies where nobody knows what is there."""
    if share >= 1.0:
        return kind
    return torch.where((kind == 0) & (covered_fraction(ignored, boxes) > share), -1, kind)


def covered_fraction(area: Bool[Tensor, "H W"], boxes: Float[Tensor, "N 4"]) -> Float[Tensor, "N"]:
    """How much of each box, cut to the picture and rounded to pixels, lies in the area; 0 for an empty one."""
    height, width = area.shape
    sums = torch.zeros(height + 1, width + 1, dtype=torch.int64, device=area.device)
    sums[1:, 1:] = area.long().cumsum(0).cumsum(1)
    limits = torch.tensor([width, height, width, height], device=boxes.device)
    x0, y0, x1, y1 = torch.minimum(boxes.round().long().clamp(min=0), limits).unbind(1)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0)).clamp(min=1)
