"""Box arithmetic and non-maximum suppression. Boxes are x0, y0, x1, y1 in pixels along the last axis."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DeltaWeights = tuple[float, float, float, float]

_MAX_LOG_SCALE = math.log(1000.0 / 16.0)
"""Upper limit of a size delta, so that an extreme one cannot overflow."""
_MIN_UNION = 1e-12


def box_area(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def clip_boxes(boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B N 4"]:
    """Clip the boxes to their images of `sizes` (height, width)."""
    height, width = sizes.to(boxes.dtype).unbind(1)
    limits = torch.stack([width, height, width, height], dim=1)[:, None]
    return torch.minimum(boxes.clamp(min=0.0), limits)


def is_nonempty(boxes: Float[Tensor, "*B 4"]) -> Bool[Tensor, "*B"]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 > x0) & (y1 > y0)


def gather_boxes(boxes: Float[Tensor, "B N 4"], index: Int[Tensor, "B k"]) -> Float[Tensor, "B k 4"]:
    """Select the boxes of each image by that image's own row of indices."""
    return boxes.gather(1, index[..., None].expand(-1, -1, boxes.shape[2]))


def box_iou(first: Float[Tensor, "*B N 4"], second: Float[Tensor, "*B M 4"]) -> Float[Tensor, "*B N M"]:
    """Intersection over union of all pairs of two sets of boxes; 0 where both are empty."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    corner = torch.maximum(first[..., :2], second[..., :2])
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - corner).clamp(min=0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = box_area(first) + box_area(second) - intersection
    return intersection / union.clamp(min=_MIN_UNION)


def get_deltas(
    sources: Float[Tensor, "*B 4"], targets: Float[Tensor, "*B 4"], weights: DeltaWeights
) -> Float[Tensor, "*B 4"]:
    """Deltas that move `sources` onto `targets` (R-CNN, appendix C; detectron2/modeling/box_regression.py)."""
    (x, y, width, height), (to_x, to_y, to_width, to_height) = _to_center_size(sources), _to_center_size(targets)
    weight_x, weight_y, weight_width, weight_height = weights
    return torch.stack(
        [
            weight_x * (to_x - x) / width,
            weight_y * (to_y - y) / height,
            weight_width * torch.log(to_width / width),
            weight_height * torch.log(to_height / height),
        ],
        dim=-1,
    )


def apply_deltas(
    sources: Float[Tensor, "*B 4"], deltas: Float[Tensor, "*B 4"], weights: DeltaWeights
) -> Float[Tensor, "*B 4"]:
    """Move and resize `sources` by the deltas; the result may extend beyond the image."""
    x, y, width, height = _to_center_size(sources)
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True))
    x, y = dx * width + x, dy * height + y
    half_width = 0.5 * torch.exp(dw.clamp(max=_MAX_LOG_SCALE)) * width
    half_height = 0.5 * torch.exp(dh.clamp(max=_MAX_LOG_SCALE)) * height
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def _to_center_size(boxes: Float[Tensor, "*B 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Center x, center y, width, height."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def nms(
    boxes: Float[Tensor, "B N 4"],
    is_valid: Bool[Tensor, "B N"],
    iou_threshold: float,
    iterations: int,
    groups: Int[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """Non-maximum suppression of static shape: which boxes to keep, given best first.

    A box is dropped if a better kept box of the same group overlaps it beyond `iou_threshold`. Greedy NMS walks down
    the list; here each iteration decides about all boxes at once, from those that the previous iteration kept. A box
    is final one iteration after the better boxes that overlap it are, so with as many iterations as the longest such
    chain the result equals greedy NMS. With fewer, only boxes further down their chain differ: an even number of
    iterations keeps some boxes too many, an odd number drops some that should stay. Rounding can tip an overlap that
    equals the threshold to the last bit either way.
    """
    order = torch.arange(boxes.shape[1], device=boxes.device)
    is_rival = (box_iou(boxes, boxes) > iou_threshold) & (order[:, None] < order)
    if groups is not None:
        is_rival = is_rival & (groups[:, :, None] == groups[:, None])
    rivals = is_rival.transpose(1, 2).to(boxes.dtype)  # B N N; row i marks the better boxes that overlap box i
    keep = is_valid
    for _ in range(iterations):
        kept_rivals = torch.matmul(rivals, keep.to(boxes.dtype)[..., None])[..., 0]
        keep = is_valid & (kept_rivals < 0.5)
    return keep


def masks_to_boxes(masks: Bool[Tensor, "B D h w"]) -> Float[Tensor, "B D 4"]:
    """Tight boxes around masks, in pixels of the masks; zeros for an empty mask."""
    edges = []
    for present in (masks.any(2), masks.any(3)):  # columns, then rows
        positions = torch.arange(present.shape[2], device=masks.device)
        is_filled = present.any(2)
        first = torch.where(present, positions, present.shape[2]).amin(2)
        last = torch.where(present, positions + 1, 0).amax(2)
        edges.append((torch.where(is_filled, first, 0), last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=2).float()
