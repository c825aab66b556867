"""Labelled photos as pictures, with what chance says of each: the n-th sample of a fit always being the same."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8
from torch import Tensor
from torch.nn import functional

from model.images import read_image
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.dataset import LabeledPhoto, read_label_map
from training.mask_transformer.crops import full_view
from training.mask_transformer.feature_dataset import (
    MAX_PASTED,
    MIN_MASK_CELLS,
    PADDING,
    Target,
    list_pasteable,
    make_semantic_map,
)
from training.mask_transformer.instances import InstanceMasks, Instances, instances_from_panoptic
from training.trainer.task import IGNORE_INDEX

_READERS = 8
"""Threads; photos are decoded outside Python's lock."""
_LEAST_AREA = 0.4
"""Of the square, that a crop shows."""
_LEAST_RATIO = 0.3
"""Of its size, that a pasted object shrinks to."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
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
class AugmentParams:
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


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """Photos before anything is done to them, and what is to be done."""

    pictures: ImageBatch
    drawn: AugmentParams
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class LoadedPhoto:
    """One photo on a square somewhat larger than the network's, so that crops are sharp."""

    square: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    objects: Instances
    extent: tuple[float, float]
    """Shares of the square's height and width that show the photo."""


@dataclass(frozen=True, kw_only=True)
class PixelDataset:
    """An endless, seeded walk over the photos: a new order each epoch. Photos once opened are kept."""

    photos: Sequence[LabeledPhoto]
    side_px: int
    thing_clusters: int
    seed: int
    paste_rate: float
    crop_rate: float
    jitter: float
    pastes_alike: bool
    whole_masks: InstanceMasks | None
    _kept: dict[str, LoadedPhoto] = field(default_factory=dict)

    @property
    def canvas_px(self) -> int:
        """Side of the squares."""
        return math.ceil(self.side_px * 8 / 7 / MASK_STRIDE_PX) * MASK_STRIDE_PX

    def read(self, first: int, count: int) -> PixelBatch:
        """Samples `first` to `first + count` of the walk; which objects are pasted hangs on these together."""
        walk = [self._choose(index) for index in range(first, first + count)]
        with ThreadPoolExecutor(_READERS) as readers:
            opened = list(readers.map(self._open, (photo for photo, _ in walk)))
        generators = [generator for _, generator in walk]
        return PixelBatch(
            pictures=_stack(opened),
            drawn=self._draw(opened, generators),
            photos=tuple(photo.path for photo, _ in walk),
        )

    def _choose(self, index: int) -> tuple[LabeledPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.seed, epoch, place_in_epoch))

    def _open(self, photo: LabeledPhoto) -> LoadedPhoto:
        if photo.digest in self._kept:
            return self._kept[photo.digest]
        picture = read_image(photo.path)
        frame = full_view(picture.height, picture.width, self.canvas_px)
        labels = frame.cut_cells(read_label_map(photo.label), -1)
        whole = self.whole_masks
        height, width = frame.letterbox.size
        opened = LoadedPhoto(
            square=frame.cut_pixels(picture.image),
            semantic=make_semantic_map(labels, photo.categories, self.thing_clusters),
            objects=whole.show(photo.digest, frame)
            if whole
            else instances_from_panoptic(labels, photo.categories, self.thing_clusters),
            extent=(height / self.canvas_px, width / self.canvas_px),
        )
        return self._kept.setdefault(photo.digest, opened)

    def _draw(self, opened: Sequence[LoadedPhoto], generators: Sequence[np.random.Generator]) -> AugmentParams:
        views = [self._draw_view(each, generator) for each, generator in zip(opened, generators, strict=True)]
        colours = [generator.uniform(1.0 - self.jitter, 1.0 + self.jitter, 3) for generator in generators]
        starts = np.cumsum([0, *(len(each.objects) for each in opened)])
        sources, pasted, receivers = list(range(len(opened))), [], []
        for place, generator in enumerate(generators):
            if generator.random() < self.paste_rate:
                sources[place], chosen = self._choose_pasted(opened, place, generator)
                pasted += (starts[sources[place]] + chosen).tolist()
                receivers += [place] * len(chosen)
        return AugmentParams(
            views=torch.from_numpy(np.stack(views)),
            colours=torch.from_numpy(np.stack(colours).astype(np.float32)),
            sources=torch.tensor(sources, dtype=torch.int64),
            placements=torch.from_numpy(np.stack([_draw_placement(generator) for generator in generators])),
            pasted=torch.tensor(pasted, dtype=torch.int64),
            receivers=torch.tensor(receivers, dtype=torch.int64),
        )

    def _draw_view(self, opened: LoadedPhoto, generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
        side = 1.0
        if generator.random() < self.crop_rate:
            side = math.sqrt(generator.uniform(_LEAST_AREA, 1.0))
        top, left = (generator.uniform(0.0, max(0.0, length - side)) for length in opened.extent)
        turn = -1.0 if generator.random() < 0.5 else 1.0
        return np.array([[turn * side, 0.0, 2 * left + side - 1], [0.0, side, 2 * top + side - 1]], np.float32)

    def _choose_pasted(
        self, opened: Sequence[LoadedPhoto], place: int, generator: np.random.Generator
    ) -> tuple[int, Int[np.ndarray, "n"]]:
        """Another picture of the batch, and places of some of its objects; with `pastes_alike` of shared clusters."""
        own = frozenset(opened[place].objects.clusters.tolist())
        others = [each for each in range(len(opened)) if each != place]
        fitting = {each: list_pasteable(opened[each].objects, own if self.pastes_alike else None) for each in others}
        others = [each for each in others if len(fitting[each])]
        if not others:
            return place, np.zeros(0, np.int64)
        source = others[int(generator.integers(len(others)))]
        return source, generator.permutation(fitting[source])[: generator.integers(1, MAX_PASTED + 1)]


def _draw_placement(generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
    """Another picture made smaller, anywhere in the square."""
    ratio = generator.uniform(_LEAST_RATIO, 1.0)
    top, left = generator.uniform(0.0, 1.0 - ratio, 2)
    across, down = ((1.0 - 2.0 * each - ratio) / ratio for each in (left, top))
    return np.array([[1.0 / ratio, 0.0, across], [0.0, 1.0 / ratio, down]], np.float32)


def _stack(opened: Sequence[LoadedPhoto]) -> ImageBatch:
    counts = [len(each.objects) for each in opened]
    return ImageBatch(
        pixels=torch.from_numpy(np.stack([each.square for each in opened])),
        semantic=torch.from_numpy(np.stack([each.semantic for each in opened]).astype(np.int64)),
        masks=torch.from_numpy(np.concatenate([each.objects.masks for each in opened])),
        owners=torch.from_numpy(np.repeat(np.arange(len(opened)), counts)),
        clusters=torch.from_numpy(np.concatenate([each.objects.clusters for each in opened]) - 1),
        weights=torch.from_numpy(np.concatenate([each.objects.weights for each in opened])),
    )


_MOST_OVERLAP = 0.5
_BAND = 5
"""Cells, as in `make_target`."""
_GREY = (0.299, 0.587, 0.114)


def augment(pictures: ImageBatch, drawn: AugmentParams, side_px: int) -> ImageBatch:
    """New pictures on squares of this size; the colour of what shows no photo stays as the network knows it."""
    pasted = _paste(_view(pictures, drawn.views, side_px), pictures, drawn)
    is_padding = _enlarge(pasted.semantic == PADDING)
    return replace(pasted, pixels=torch.where(is_padding, pasted.pixels, color_jitter(pasted.pixels, drawn.colours)))


def color_jitter(pixels: UInt8[Tensor, "B 3 S S"], factors: Float[Tensor, "B 3"]) -> UInt8[Tensor, "B 3 S S"]:
    """Brightness, then contrast about the mean grey, then saturation about each pixel's own, times a factor."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = torch.tensor(_GREY, device=pixels.device)[:, None, None]
    bright = pixels.float() * brightness
    middle = (bright * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    stark = middle + (bright - middle) * contrast
    grey = (stark * weights).sum(1, keepdim=True)
    return (grey + (stark - grey) * saturation).round().clamp(0, 255).to(torch.uint8)


def split(pictures: ImageBatch, *, drops_unknown: bool) -> tuple[Target, ...]:
    """What each picture should be answered with, as `make_target` of `data.py` has it."""
    sizes = pictures.masks.flatten(1).sum(1)
    kept = sizes >= MIN_MASK_CELLS
    masks, owners = pictures.masks[kept], pictures.owners[kept]
    is_thing = pictures.semantic == 0
    wide = functional.max_pool2d(is_thing[:, None].float(), _BAND, 1, _BAND // 2)[:, 0] > 0
    semantic = pictures.semantic.masked_fill((pictures.semantic < 0) | (wide & ~is_thing), IGNORE_INDEX)
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


def _view(pictures: ImageBatch, views: Float[Tensor, "B 2 3"], side_px: int) -> ImageBatch:
    cells = side_px // MASK_STRIDE_PX
    semantic = _sample(pictures.semantic[:, None].float(), views, cells, "nearest")[:, 0]
    masks = _sample(pictures.masks[:, None].float(), views[pictures.owners], cells, "nearest")[:, 0]
    return replace(
        pictures,
        pixels=_sample(pictures.pixels.float(), views, side_px, "bilinear").round().to(torch.uint8),
        semantic=semantic.round().long(),
        masks=masks > 0.5,
    )


def _paste(base: ImageBatch, pictures: ImageBatch, drawn: AugmentParams) -> ImageBatch:
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
    return ImageBatch(
        pixels=torch.where(_enlarge(cover), brought.round().to(torch.uint8), base.pixels),
        semantic=base.semantic.masked_fill(cover, 0),
        masks=torch.cat([remaining, masks])[order],
        owners=owners[order],
        clusters=torch.cat([base.clusters[~lost], pictures.clusters[drawn.pasted]])[order],
        weights=torch.cat([base.weights[~lost], pictures.weights[drawn.pasted]])[order],
    )


def _enlarge(cells: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B 1 S S"]:
    return cells.repeat_interleave(MASK_STRIDE_PX, 1).repeat_interleave(MASK_STRIDE_PX, 2)[:, None]


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
