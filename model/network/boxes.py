"""Arithmetic of boxes: x0, y0, x1, y1 in pixels, the last axis."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weights = tuple[float, float, float, float]

_MOST_GROWTH = math.log(1000.0 / 16.0)
"""A side grows at most by this factor's exponential, so that a wild delta cannot overflow."""
_LEAST_UNION = 1e-12


def measure_area(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def clip(boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B N 4"]:
    """The boxes cut to their pictures; `sizes` are height, width."""
    height, width = sizes.to(boxes.dtype).unbind(1)
    limits = torch.stack([width, height, width, height], dim=1)[:, None]
    return torch.minimum(boxes.clamp(min=0.0), limits)


def has_area(boxes: Float[Tensor, "*B 4"]) -> Bool[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 > x0) & (y1 > y0)


def compare(boxes: Float[Tensor, "B N 4"]) -> Float[Tensor, "B N N"]:
    """Intersection over union of all pairs; 0 where both are empty."""
    first, second = boxes[:, :, None], boxes[:, None]
    corner = torch.maximum(first[..., :2], second[..., :2])
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - corner).clamp(min=0.0)
    inner = sides[..., 0] * sides[..., 1]
    area = measure_area(boxes)
    union = area[:, :, None] + area[:, None] - inner
    return inner / union.clamp(min=_LEAST_UNION)


def encode(sources: Float[Tensor, "*B 4"], targets: Float[Tensor, "*B 4"], weights: Weights) -> Float[Tensor, "*B 4"]:
    """Deltas that move `sources` on `targets` (R-CNN, appendix C; detectron2/modeling/box_regression.py)."""
    (x, y, width, height), (to_x, to_y, to_width, to_height) = _centre(sources), _centre(targets)
    along_x, along_y, of_width, of_height = weights
    return torch.stack(
        [
            along_x * (to_x - x) / width,
            along_y * (to_y - y) / height,
            of_width * torch.log(to_width / width),
            of_height * torch.log(to_height / height),
        ],
        dim=-1,
    )


def decode(sources: Float[Tensor, "*B 4"], deltas: Float[Tensor, "*B 4"], weights: Weights) -> Float[Tensor, "*B 4"]:
    """The boxes that the deltas make of `sources`; may leave the picture."""
    x, y, width, height = _centre(sources)
    dx, dy, growth_x, growth_y = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True))
    x, y = dx * width + x, dy * height + y
    half_width = 0.5 * torch.exp(growth_x.clamp(max=_MOST_GROWTH)) * width
    half_height = 0.5 * torch.exp(growth_y.clamp(max=_MOST_GROWTH)) * height
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def _centre(boxes: Float[Tensor, "*B 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width, height."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height
