"""RoIAlign over the levels of a feature pyramid, with static shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from model.networks.boxes import box_area

_CANONICAL_SIDE_PX = 224.0
_CANONICAL_LEVEL = 4
_MIN_STEP = 0.5
"""Minimum distance of two samples of a bin in pixels: a bin of b pixels has ceil(b) samples."""
_NEIGHBOURS = 6
"""Maximum number of samples within a pixel of a given one, plus one for rounding."""
_SHIFT = 0.5
"""Pixel centers lie half a pixel from pixel borders ("aligned")."""
_MAX_SQUARE_SIDE = 38
"""Longest side of a roughly square box on the last level, in pixels; on other levels it is 28."""


@dataclass(frozen=True, kw_only=True)
class RoiAlignConfig:
    """Sampling density: one sample per pixel (detectron2's sampling ratio 0), up to a maximum length of boxes."""

    max_box_side: int = 304
    """Longest box sampled at full density, in feature-map pixels. Default: 1,216 px at stride 4."""

    def max_samples(self, side: int) -> int:
        """Maximum number of samples of a bin along one axis."""
        return math.ceil(self.max_box_side / side)

    def max_taps(self, side: int) -> int:
        """Maximum number of pixels around a bin: of the longest box, which is thin, or of a large square one.

        A box is assigned to a level by its area: below the last level it covers less than 28 x 28 pixels.
        """
        samples = self.max_samples(side)
        return max(2 * (samples + 1), (min(samples, math.ceil(_MAX_SQUARE_SIDE / side)) + 1) ** 2)


def roi_align(
    levels: Sequence[Float[Tensor, "B C h w"]],
    strides_px: Sequence[int],
    boxes: Float[Tensor, "B N 4"],
    side: int,
    config: RoiAlignConfig,
) -> Float[Tensor, "B N C side side"]:
    """Pool the features of each box, from the level that matches its size, into side x side bins.

    RoIAlign (Mask R-CNN, section 3) with level assignment by equation 1 of Feature Pyramid Networks, as detectron2's
    `ROIPooler` with "ROIAlignV2". There a bin of b pixels takes ceil(b) samples along each axis, which depends on the
    box. Here every bin is a weighted sum over `config.max_taps(side)` pixels, of which unused ones have weight 0: the
    same average. A box that would need more gets fewer samples, evenly spaced: a coarser average. On a CPU this is
    about 50 times as fast as `grid_sample` and closer to the reference. It computes in float32; boxes get no gradient,
    and a box that is not finite does not affect the others.
    """
    boxes = torch.nan_to_num(boxes.detach().float())
    assigned = assign_levels(boxes, strides_px)
    heights, widths = (
        select_value([torch.sym_float(maps.shape[axis]) for maps in levels], assigned) for axis in (2, 3)
    )
    scales = select_value([1.0 / stride for stride in strides_px], assigned)
    x0, y0, x1, y1 = (boxes * scales[..., None] - _SHIFT).unbind(-1)
    across, down = count_samples(x1 - x0, y1 - y0, side, config)
    columns, column_weights = sample_weights(x0, x1, widths, across, side, config)
    rows, row_weights = sample_weights(y0, y1, heights, down, side, config)
    rows = _find_first_pixels(levels, assigned)[..., None, None] + rows * widths.long()[..., None, None]
    # The pixels of a bin, row by row, as many as any box may need: B N K
    tap = torch.arange(config.max_taps(side), device=boxes.device)
    row, column = tap // (across[..., None] + 1), tap % (across[..., None] + 1)
    is_used = row <= down[..., None]
    row = torch.minimum(row, down[..., None])
    pixels = _gather_samples(rows, row)[:, :, :, None] + _gather_samples(columns, column)[:, :, None]  # B N side side K
    row_weight = _gather_samples(row_weights, row) * is_used[:, :, None]
    weights = row_weight[:, :, :, None] * _gather_samples(column_weights, column)[:, :, None]
    return _sum_pixels(levels, pixels, weights)


def _gather_samples(taps: Tensor, index: Int[Tensor, "B N K"]) -> Tensor:
    """Select from `taps` (B N side T) by each box's own index, for every bin: B N side K."""
    return taps.gather(3, index[:, :, None].expand(-1, -1, taps.shape[2], -1))


def select_value(values: Sequence[float], index: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Look up constants by index, without a table that would be copied to the device on every call."""
    found = torch.zeros_like(index, dtype=torch.float32)
    for position, value in enumerate(values):
        found = torch.where(index == position, value, found)
    return found


def assign_levels(boxes: Float[Tensor, "B N 4"], strides_px: Sequence[int]) -> Int[Tensor, "B N"]:
    """Index of each box's level: where a square box is 14 to 28 pixels long, or the nearest level."""
    first = round(math.log2(strides_px[0]))
    size = torch.sqrt(box_area(boxes))
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(size / _CANONICAL_SIDE_PX + 1e-8))
    return (level.clamp(first, first + len(strides_px) - 1) - first).long()


def count_samples(
    width: Float[Tensor, "B N"], height: Float[Tensor, "B N"], side: int, config: RoiAlignConfig
) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Samples of a bin along each axis: one per pixel, fewer along the longer axis beyond `max_taps`."""
    across, down = (torch.ceil(length / side).clamp(0, config.max_samples(side)).long() for length in (width, height))
    taps = config.max_taps(side)
    across, down = (
        torch.minimum(count, torch.where(count >= other, taps // (other + 1) - 1, count))
        for count, other in ((across, down), (down, across))
    )
    return across, down


def sample_weights(
    start: Float[Tensor, "B N"],
    end: Float[Tensor, "B N"],
    extent: Float[Tensor, "B N"],
    count: Int[Tensor, "B N"],
    side: int,
    config: RoiAlignConfig,
) -> tuple[Int[Tensor, "B N side T"], Float[Tensor, "B N side T"]]:
    """Pixels that the samples of each bin interpolate between along one axis, and the weight of each pixel.

    Samples are at most one pixel apart, so count + 1 consecutive pixels hold them all; with fewer samples than pixels,
    the pixels are spread out like them. A sample more than one pixel outside the map counts as zero, a nearer one as
    if it were on the border; an empty box has no samples.
    """
    samples = count[..., None, None].float()  # B N 1 1
    length = ((end - start) / side)[..., None, None]
    bins = torch.arange(side, device=start.device)[:, None]
    step = length / samples.clamp(min=1.0)
    origin = start[..., None, None] + bins * length + 0.5 * step  # of the first sample, B N side 1
    last = extent[..., None, None] - 1.0
    apart = step.clamp(min=1.0)
    taps = torch.floor(torch.minimum(origin.clamp(min=0.0), last)) + apart * torch.arange(
        config.max_samples(side) + 1, device=start.device
    )  # B N side T
    # The samples within a pixel of each tap, also beyond the border; a single sample lies at the origin.
    step = step.clamp(min=_MIN_STEP)
    first = torch.floor((taps - apart - origin) / step)
    shares = torch.zeros_like(taps)
    for offset in range(_NEIGHBOURS):
        sample = first + offset
        position = origin + sample * step
        is_counted = (sample >= 0.0) & (sample < samples) & (position >= -1.0) & (position <= last + 1.0)
        distance = (torch.minimum(position.clamp(min=0.0), last) - taps).abs() / apart
        shares = shares + (1.0 - distance).clamp(min=0.0) * is_counted
    return torch.minimum(taps.round(), last).long(), shares / samples.clamp(min=1.0)


def _find_first_pixels(levels: Sequence[Float[Tensor, "B C h w"]], assigned: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Index of the first pixel of each box's level in the table of `_sum_pixels`: by image, level, row, column."""
    areas = [maps.shape[2] * maps.shape[3] for maps in levels]
    before = select_value([torch.sym_float(sum(areas[:index])) for index in range(len(areas))], assigned).long()
    return before + torch.arange(assigned.shape[0], device=assigned.device)[:, None] * sum(areas)


def _sum_pixels(
    levels: Sequence[Float[Tensor, "B C h w"]],
    pixels: Int[Tensor, "B N side side T"],
    weights: Float[Tensor, "B N side side T"],
) -> Float[Tensor, "B N C side side"]:
    """Weighted sums of pixels, indexed as in `_find_first_pixels`."""
    # The channels of a pixel must be contiguous, or the sums take six times as long.
    table = torch.cat([maps.flatten(2) for maps in levels], dim=2).transpose(1, 2).float().contiguous()
    sums = functional.embedding_bag(
        pixels.flatten(0, 3), table.flatten(0, 1), mode="sum", per_sample_weights=weights.flatten(0, 3)
    )  # B*N*side*side C
    bins: Tensor = sums.unflatten(0, pixels.shape[:4])
    return bins.permute(0, 1, 4, 2, 3).to(levels[0].dtype)


_OPSET = 18


def roi_align_onnx(
    levels: Sequence[Float[Tensor, "B C h w"]],
    strides_px: Sequence[int],
    boxes: Float[Tensor, "B N 4"],
    side: int,
) -> Float[Tensor, "B N C side side"]:
    """`roi_align` as one ONNX RoiAlign operator over all levels. For export only: in torch it computes nothing.

    The levels are stacked on one map, each within a border that repeats its outermost pixels, since RoIAlign clamps a
    sample up to one pixel outside to the edge. Four operators, one per level, would each pool every box. The operator
    takes as many samples as a box needs, and samples far outside a level would read the
    next one: boxes must be clipped to their images, as all of ours are.
    """
    batch, count = boxes.shape[:2]
    boxes = torch.where(boxes == boxes, boxes, 0.0)  # with NaN the operator would read out of bounds
    stacked, tops = _stack_levels(levels)
    images = torch.arange(batch, device=boxes.device)[:, None].expand(batch, count)
    pooled = torch.onnx.ops.symbolic(
        "RoiAlign",
        (stacked, _to_stacked_coordinates(boxes, strides_px, tops).flatten(0, 1), images.flatten()),
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


def _to_stacked_coordinates(
    boxes: Float[Tensor, "B N 4"], strides_px: Sequence[int], tops: list[int]
) -> Float[Tensor, "B N 4"]:
    """Boxes in pixels of the stacked map, on which each level begins at one of the rows `tops`."""
    assigned = assign_levels(boxes, strides_px)
    scales = select_value([1.0 / stride for stride in strides_px], assigned)[..., None]
    first_rows = select_value([torch.sym_float(top + 1) for top in tops], assigned)
    shift = torch.stack([torch.ones_like(first_rows), first_rows], dim=2)  # B N 2
    return boxes * scales + torch.cat([shift, shift], dim=2)


def _stack_levels(levels: Sequence[Float[Tensor, "B C h w"]]) -> tuple[Float[Tensor, "B C i j"], list[int]]:
    """Stack the levels below each other, each with its border; also returns the first row of each."""
    width = levels[0].shape[3]
    rows, tops, top = [], [], 0
    for maps in levels:
        bordered = functional.pad(maps, (1, 1, 1, 1), mode="replicate")
        rows.append(functional.pad(bordered, (0, width - maps.shape[3])))
        tops.append(top)
        top = top + maps.shape[2] + 2
    return torch.cat(rows, dim=2).float(), tops
