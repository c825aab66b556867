"""Arithmetic of boxes: x0, y0, x1, y1 in pixels, the last axis."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DeltaWeights = tuple[float, float, float, float]

_MAX_LOG_SCALE = math.log(1000.0 / 16.0)
"""A side grows at most by this factor's exponential, so that a wild delta cannot overflow."""
_MIN_UNION = 1e-12


def box_area(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def clip_boxes(boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B N 4"]:
    """The boxes cut to their pictures; `sizes` are height, width."""
    height, width = sizes.to(boxes.dtype).unbind(1)
    limits = torch.stack([width, height, width, height], dim=1)[:, None]
    return torch.minimum(boxes.clamp(min=0.0), limits)


def is_nonempty(boxes: Float[Tensor, "*B 4"]) -> Bool[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 > x0) & (y1 > y0)


def box_iou(boxes: Float[Tensor, "B N 4"]) -> Float[Tensor, "B N N"]:
    """Intersection over union of all pairs; 0 where both are empty."""
    first, second = boxes[:, :, None], boxes[:, None]
    corner = torch.maximum(first[..., :2], second[..., :2])
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - corner).clamp(min=0.0)
    inner = sides[..., 0] * sides[..., 1]
    area = box_area(boxes)
    union = area[:, :, None] + area[:, None] - inner
    return inner / union.clamp(min=_MIN_UNION)


def get_deltas(
    sources: Float[Tensor, "*B 4"], targets: Float[Tensor, "*B 4"], weights: DeltaWeights
) -> Float[Tensor, "*B 4"]:
    """Deltas that move `sources` on `targets` (R-CNN, appendix C; detectron2/modeling/box_regression.py)."""
    (x, y, width, height), (to_x, to_y, to_width, to_height) = _to_center_size(sources), _to_center_size(targets)
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


def apply_deltas(
    sources: Float[Tensor, "*B 4"], deltas: Float[Tensor, "*B 4"], weights: DeltaWeights
) -> Float[Tensor, "*B 4"]:
    """The boxes that the deltas make of `sources`; may leave the picture."""
    x, y, width, height = _to_center_size(sources)
    dx, dy, growth_x, growth_y = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True))
    x, y = dx * width + x, dy * height + y
    half_width = 0.5 * torch.exp(growth_x.clamp(max=_MAX_LOG_SCALE)) * width
    half_height = 0.5 * torch.exp(growth_y.clamp(max=_MAX_LOG_SCALE)) * height
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def _to_center_size(boxes: Float[Tensor, "*B 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width, height."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def nms(
    boxes: Float[Tensor, "B N 4"],
    is_used: Bool[Tensor, "B N"],
    threshold: float,
    nms_iterations: int,
    groups: Int[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """Which boxes stay, given best first: those that no better box that stays overlaps beyond `threshold`.

    Greedy suppression walks down the list; here every sweep decides all boxes at once, from what the sweep before kept.
    The first starts from all boxes. A box that should stay is right one sweep after the last of its better rivals, or
    from the start if it has none; one that should not, one sweep after the first of those rivals that should. What is
    right stays so: with as many sweeps as the slowest box takes, its chain, the answer is the greedy one. Cut short, it
    differs in the slower boxes alone: after an even number of sweeps all boxes that should stay do, with others beside
    them; after an odd number none stays that should not, but some are missing. Rounding may tip an overlap within a
    last bit of the threshold either way, as it may between two machines.
    """
    order = torch.arange(boxes.shape[1], device=boxes.device)
    is_rival = (box_iou(boxes) > threshold) & (order[:, None] < order)
    if groups is not None:
        is_rival = is_rival & (groups[:, :, None] == groups[:, None])
    rivals = is_rival.transpose(1, 2).to(boxes.dtype)  # B N N; row i marks the better rivals of box i
    keep = is_used
    for _ in range(nms_iterations):
        staying = torch.matmul(rivals, keep.to(boxes.dtype)[..., None])[..., 0]
        keep = is_used & (staying < 0.5)
    return keep
