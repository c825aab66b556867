"""A batch of labelled photos cropped, mirrored, recoloured and pasted into each other, as tensors on any device.

Everything that is drawn is drawn beforehand: a handful of kernels do a whole batch, and none waits for another device.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from model.network.mask_transformer import STRIDE_PX
from training.fitting.loop.trainee import IGNORE
from training.fitting.transformer.augment import PADDING
from training.fitting.transformer.data import LEAST_CELLS, Target

_MOST_OVERLAP = 0.5
_BAND = 5
"""Cells, as in `make_target`."""
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Photos on squares of one size, and the objects of all of them."""

    pixels: UInt8[Tensor, "B 3 S S"]
    semantic: Int[Tensor, "B h w"]
    """0 things, s stuff cluster s, VOID or PADDING."""
    masks: Bool[Tensor, "P h w"]
    owners: Int[Tensor, "P"]
    """Places of the pictures that have the objects; in order."""
    clusters: Int[Tensor, "P"]
    """Counted from 0."""
    weights: Float[Tensor, "P"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What chance says of a batch. A view is a matrix from places in the new square to places in the old, -1..1."""

    views: Float[Tensor, "B 2 3"]
    colours: Float[Tensor, "B 3"]
    """Factors of brightness, contrast and saturation."""
    sources: Int[Tensor, "B"]
    """Places of the pictures that objects are pasted from."""
    placements: Float[Tensor, "B 2 3"]
    """Views of these."""
    pasted: Int[Tensor, "N"]
    """Places of the objects that are pasted."""
    receivers: Int[Tensor, "N"]
    """Places of the pictures that they are pasted into."""


def augment(pictures: Pictures, drawn: Drawn, side_px: int) -> Pictures:
    """New pictures on squares of this size; the colour of what shows no photo stays as the network knows it."""
    pasted = _paste(_view(pictures, drawn.views, side_px), pictures, drawn)
    is_padding = _enlarge(pasted.semantic == PADDING)
    return replace(pasted, pixels=torch.where(is_padding, pasted.pixels, recolour(pasted.pixels, drawn.colours)))


def recolour(pixels: UInt8[Tensor, "B 3 S S"], factors: Float[Tensor, "B 3"]) -> UInt8[Tensor, "B 3 S S"]:
    """Brightness, then contrast about the mean grey, then saturation about each pixel's own, times a factor."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = torch.tensor(_GREY, device=pixels.device)[:, None, None]
    bright = pixels.float() * brightness
    middle = (bright * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    stark = middle + (bright - middle) * contrast
    grey = (stark * weights).sum(1, keepdim=True)
    return (grey + (stark - grey) * saturation).round().clamp(0, 255).to(torch.uint8)


def split(pictures: Pictures, *, drops_unknown: bool) -> tuple[Target, ...]:
    """What each picture should be answered with, as `make_target` of `data.py` has it."""
    sizes = pictures.masks.flatten(1).sum(1)
    kept = sizes >= LEAST_CELLS
    masks, owners = pictures.masks[kept], pictures.owners[kept]
    is_thing = pictures.semantic == 0
    wide = functional.max_pool2d(is_thing[:, None].float(), _BAND, 1, _BAND // 2)[:, 0] > 0
    semantic = pictures.semantic.masked_fill((pictures.semantic < 0) | (wide & ~is_thing), IGNORE)
    known = torch.ones_like(is_thing)
    if drops_unknown:
        known = (pictures.semantic > 0) | (pictures.semantic == PADDING) | _unite(masks, owners, len(known))
    clusters, weights = pictures.clusters[kept], pictures.weights[kept]
    counts = owners.bincount(minlength=len(known)).tolist()
    parts = zip(*(each.split(counts) for each in (masks, clusters, weights)), semantic, known, strict=True)
    return tuple(
        Target(masks=mask.float(), clusters=cluster, weights=weight, semantic=labels, known=sure)
        for mask, cluster, weight, labels, sure in parts
    )


def _view(pictures: Pictures, views: Float[Tensor, "B 2 3"], side_px: int) -> Pictures:
    cells = side_px // STRIDE_PX
    semantic = _sample(pictures.semantic[:, None].float(), views, cells, "nearest")[:, 0]
    masks = _sample(pictures.masks[:, None].float(), views[pictures.owners], cells, "nearest")[:, 0]
    return replace(
        pictures,
        pixels=_sample(pictures.pixels.float(), views, side_px, "bilinear").round().to(torch.uint8),
        semantic=semantic.round().long(),
        masks=masks > 0.5,
    )


def _paste(base: Pictures, pictures: Pictures, drawn: Drawn) -> Pictures:
    """The base with objects of the pictures; its own lose what is covered, and go if that is more than half."""
    cells, side_px = base.masks.shape[-1], base.pixels.shape[-1]
    moved = pictures.masks[drawn.pasted][:, None].float()
    masks = _sample(moved, drawn.placements[drawn.receivers], cells, "nearest", outside="zeros")[:, 0] > 0.5
    masks = masks & (base.semantic[drawn.receivers] != PADDING)
    cover = _unite(masks, drawn.receivers, len(base.pixels))
    hidden = cover[base.owners]
    lost = (base.masks & hidden).flatten(1).sum(1) > _MOST_OVERLAP * base.masks.flatten(1).sum(1)
    remaining = (base.masks & ~hidden)[~lost]
    brought = _sample(pictures.pixels[drawn.sources].float(), drawn.placements, side_px, "bilinear")
    owners = torch.cat([base.owners[~lost], drawn.receivers])
    order = owners.argsort(stable=True)
    return Pictures(
        pixels=torch.where(_enlarge(cover), brought.round().to(torch.uint8), base.pixels),
        semantic=base.semantic.masked_fill(cover, 0),
        masks=torch.cat([remaining, masks])[order],
        owners=owners[order],
        clusters=torch.cat([base.clusters[~lost], pictures.clusters[drawn.pasted]])[order],
        weights=torch.cat([base.weights[~lost], pictures.weights[drawn.pasted]])[order],
    )


def _enlarge(cells: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B 1 S S"]:
    return cells.repeat_interleave(STRIDE_PX, 1).repeat_interleave(STRIDE_PX, 2)[:, None]


def _unite(masks: Bool[Tensor, "P h w"], owners: Int[Tensor, "P"], count: int) -> Bool[Tensor, "B h w"]:
    summed = torch.zeros(count, *masks.shape[1:], device=masks.device)
    return summed.index_add_(0, owners, masks.float()) > 0


def _sample(
    maps: Float[Tensor, "N C H W"], views: Float[Tensor, "N 2 3"], side: int, method: str, outside: str = "border"
) -> Float[Tensor, "N C side side"]:
    if not len(maps):
        return maps.new_zeros(0, maps.shape[1], side, side)
    grid = functional.affine_grid(views, [len(maps), 1, side, side], align_corners=False)
    return functional.grid_sample(maps, grid, mode=method, padding_mode=outside, align_corners=False)
