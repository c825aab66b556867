"""Masks of objects inside boxes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def crop_masks(
    masks: Bool[Tensor, "M H W"], boxes: Float[Tensor, "N 4"], index: Int[Tensor, "N"], side: int
) -> Bool[Tensor, "N side side"]:
    """What each box shows of the mask that `index` names: the cells of which half or more is covered.

    RoIAlign with a sample for each pixel, as detectron2's `BitMasks.crop_and_resize`. Its samples form a lattice, so
    that rows and columns are averaged one after the other.
    """
    return crop_maps(masks[index].float(), boxes, side) >= 0.5


def crop_maps(maps: Float[Tensor, "N H W"], boxes: Float[Tensor, "N 4"], side: int) -> Float[Tensor, "N side side"]:
    """The mean of each map in the cells of its box, in pixels of the map."""
    x0, y0, x1, y1 = boxes.float().unbind(1)
    rows = _average(y0, y1, maps.shape[1], side)
    columns = _average(x0, x1, maps.shape[2], side)
    with torch.autocast(maps.device.type, enabled=False):  # half of a cell must be told from less
        return torch.bmm(torch.bmm(rows, maps), columns.transpose(1, 2))


def _average(
    start: Float[Tensor, "N"], end: Float[Tensor, "N"], extent: int, side: int
) -> Float[Tensor, "N side extent"]:
    """How much each of `extent` pixels counts in each bin between `start` and `end`.

    Bilinear samples at most a pixel apart; one that lies more than a pixel outside counts as zero, and
    an empty box has none.
    """
    length = ((end - start) / side)[:, None, None]
    count = torch.ceil(length)
    samples = count.clamp(min=1.0)
    sample = torch.arange(int(samples.max()) if len(samples) else 0, device=start.device)
    bins = torch.arange(side, device=start.device)[:, None]
    position = start[:, None, None] - 0.5 + (bins + (sample + 0.5) / samples) * length  # N side samples
    is_counted = (sample < count) & (position >= -1.0) & (position <= extent)
    position = position.clamp(0.0, extent - 1.0)
    first = position.floor()
    later = (position - first) * is_counted / samples
    weights = torch.zeros(len(start), side, extent, device=start.device)
    weights.scatter_add_(2, first.long(), is_counted / samples - later)
    return weights.scatter_add_(2, (first.long() + 1).clamp(max=extent - 1), later)
