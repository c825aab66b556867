"""RoIAlign as ONNX's own operator, for export alone: in torch it says nothing."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from model.network.roi import Sampling, assign_levels, look_up

_OPSET = 18


def emit_pool(
    levels: Sequence[Float[Tensor, "B C h w"]],
    strides_px: Sequence[int],
    boxes: Float[Tensor, "B N 4"],
    side: int,
    sampling: Sampling,
) -> Float[Tensor, "B N C side side"]:
    """What `model.network.roi.pool` answers, as one RoiAlign on all levels.

    The levels lie below each other on one map, each within a border of its own outermost cells, since RoIAlign counts
    a sample up to a cell outside as if it lay on the edge. Four operators, one a level, would each pool every box.
    Unlike `pool`, the operator takes as many samples as a box asks for, whatever `sampling` says, and samples far
    outside its level meet the next one: boxes must be cut to their pictures, as all of ours are.
    """
    batch, count = boxes.shape[:2]
    boxes = torch.where(boxes == boxes, boxes, 0.0)  # where a number is none the operator would read any memory
    canvas, tops = _stack(levels)
    pictures = torch.arange(batch, device=boxes.device)[:, None].expand(batch, count)
    pooled = torch.onnx.ops.symbolic(
        "RoiAlign",
        (canvas, _place(boxes, strides_px, tops).flatten(0, 1), pictures.flatten()),
        attrs={
            "output_height": side,
            "output_width": side,
            "sampling_ratio": 0,
            "spatial_scale": 1.0,
            "mode": "avg",
            "coordinate_transformation_mode": "half_pixel",
        },
        dtype=torch.float32,
        shape=(batch * count, levels[0].shape[1], side, side),
        version=_OPSET,
    )
    bins: Tensor = pooled.unflatten(0, (batch, count))
    return bins


def _place(boxes: Float[Tensor, "B N 4"], strides_px: Sequence[int], tops: list[int]) -> Float[Tensor, "B N 4"]:
    """Each box in cells of the map on which its level begins at one of `tops`."""
    assigned = assign_levels(boxes, strides_px)
    scales = look_up([1.0 / stride for stride in strides_px], assigned)[..., None]
    first_rows = torch.zeros_like(assigned)
    for index, top in enumerate(tops):
        first_rows = torch.where(assigned == index, top + 1, first_rows)
    shift = torch.stack([torch.ones_like(first_rows), first_rows], dim=2).float()  # B N 2
    return boxes * scales + torch.cat([shift, shift], dim=2)


def _stack(levels: Sequence[Float[Tensor, "B C h w"]]) -> tuple[Float[Tensor, "B C i j"], list[int]]:
    """The levels below each other, each in its border, and the first row of each."""
    width = levels[0].shape[3]
    rows, tops, top = [], [], 0
    for maps in levels:
        bordered = functional.pad(maps, (1, 1, 1, 1), mode="replicate")
        rows.append(functional.pad(bordered, (0, width - maps.shape[3])))
        tops.append(top)
        top = top + maps.shape[2] + 2
    return torch.cat(rows, dim=2).float(), tops
