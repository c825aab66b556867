"""Training samples from pixels: photos are loaded on the CPU and augmented as a batch on the training device.

All random parameters are sampled while loading, so that the device runs a few kernels per batch and never waits.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor
from torch.nn import functional

from model.images import read_image
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.dataset import LabeledPhoto
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.samples import (
    MAX_PASTED,
    PADDING,
    ImageBatch,
    LabelReader,
    Sample,
    collate,
    full_view,
    union_by_image,
)
from training.trainer.task import PhotoSampler, TrainingBatch

_LOADER_THREADS = 8
_MAX_COVERED = 0.5
"""Fraction of an instance that pasted ones may cover."""
_LUMA = (0.299, 0.587, 0.114)
_MIN_CROP_AREA = 0.4
"""Smallest crop, as a fraction of the input."""
_MIN_PASTE_SCALE = 0.3
_OVERSIZE = 8 / 7
"""Photos are loaded larger than the network's input, so that crops are sharp."""


@dataclass(frozen=True, kw_only=True)
class AugmentParams:
    """Random parameters of a batch. Transforms map coordinates of the new square to those of the old, -1..1."""

    transforms: Float[Tensor, "B 2 3"]
    color_factors: Float[Tensor, "B 3"]
    """Factors of brightness, contrast and saturation."""
    source_images: Int[Tensor, "B"]
    """Index of the photo whose instances are pasted into each photo."""
    paste_transforms: Float[Tensor, "B 2 3"]
    """Transforms of the source photos."""
    pasted_instances: Int[Tensor, "N"]
    """Indices of the pasted instances."""
    target_images: Int[Tensor, "N"]
    """Index of the photo that each of them is pasted into."""


@dataclass(frozen=True, kw_only=True)
class PixelBatch(TrainingBatch):
    """Photos before augmentation, and the parameters of their augmentation."""

    images: ImageBatch
    params: AugmentParams


@dataclass(frozen=True)
class PixelDataset:
    """Samples of a label dataset, from pixels. Loaded photos stay in memory."""

    sampler: PhotoSampler
    labels: LabelReader
    side_px: int
    """Side of the encoder's input."""
    config: MaskTransformerTrainConfig
    _loaded: dict[str, Sample] = field(default_factory=dict)

    @property
    def loaded_px(self) -> int:
        """Side of the squares before augmentation."""
        return math.ceil(self.side_px * _OVERSIZE / MASK_STRIDE_PX) * MASK_STRIDE_PX

    def load_batch(self, first: int, count: int) -> PixelBatch:
        """Load samples `first` to `first + count`; instances are pasted between photos of this batch."""
        photos, generators = self.sampler.sample(first, count)
        with ThreadPoolExecutor(_LOADER_THREADS) as threads:
            loaded = list(threads.map(self._load_photo, photos))
        return PixelBatch(
            images=collate(loaded),
            params=self._sample_params(photos, loaded, generators),
            photos=tuple(photo.path for photo in photos),
        )

    def _load_photo(self, photo: LabeledPhoto) -> Sample:
        if photo.digest in self._loaded:
            return self._loaded[photo.digest]
        view = full_view(photo.height, photo.width, self.loaded_px)
        semantic, instances = self.labels.read(photo, view)
        pixels = view.crop_image(read_image(photo.path).image)
        loaded = Sample(pixels=pixels, semantic=semantic, instances=instances)
        return self._loaded.setdefault(photo.digest, loaded)

    def _sample_params(
        self, photos: Sequence[LabeledPhoto], loaded: Sequence[Sample], generators: Sequence[np.random.Generator]
    ) -> AugmentParams:
        jitter = self.config.color_jitter
        transforms = [self._sample_transform(*each) for each in zip(photos, generators, strict=True)]
        colors = [generator.uniform(1.0 - jitter, 1.0 + jitter, 3) for generator in generators]
        starts = np.cumsum([0, *(len(each.instances) for each in loaded)])
        sources, pasted, targets = list(range(len(loaded))), [], []
        for index, generator in enumerate(generators):
            if generator.random() < self.config.copy_paste_prob:
                sources[index], chosen = self._sample_pasted(loaded, index, generator)
                pasted += (starts[sources[index]] + chosen).tolist()
                targets += [index] * len(chosen)
        return AugmentParams(
            transforms=torch.from_numpy(np.stack(transforms)),
            color_factors=torch.from_numpy(np.stack(colors).astype(np.float32)),
            source_images=torch.tensor(sources, dtype=torch.int64),
            paste_transforms=torch.from_numpy(np.stack([_sample_paste_transform(each) for each in generators])),
            pasted_instances=torch.tensor(pasted, dtype=torch.int64),
            target_images=torch.tensor(targets, dtype=torch.int64),
        )

    def _sample_transform(self, photo: LabeledPhoto, generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
        """Sample a crop with as little padding as possible, and a mirroring."""
        side = 1.0
        if generator.random() < self.config.crop_prob:
            side = math.sqrt(generator.uniform(_MIN_CROP_AREA, 1.0))
        shown = full_view(photo.height, photo.width, self.loaded_px).letterbox.size
        top, left = (generator.uniform(0.0, max(0.0, length / self.loaded_px - side)) for length in shown)
        sign = -1.0 if generator.random() < 0.5 else 1.0
        return np.array([[sign * side, 0.0, 2 * left + side - 1], [0.0, side, 2 * top + side - 1]], np.float32)

    def _sample_pasted(
        self, loaded: Sequence[Sample], index: int, generator: np.random.Generator
    ) -> tuple[int, Int[np.ndarray, "n"]]:
        """Sample another photo of the batch and some of its instances, of shared clusters if so configured."""
        own = frozenset(loaded[index].instances.clusters.tolist())
        clusters = own if self.config.copy_paste_same_class else None
        pasteable = {
            other: photo.instances.find_pasteable(clusters) for other, photo in enumerate(loaded) if other != index
        }
        others = [other for other, instances in pasteable.items() if len(instances)]
        if not others:
            return index, np.zeros(0, np.int64)
        source = others[int(generator.integers(len(others)))]
        return source, generator.permutation(pasteable[source])[: generator.integers(1, MAX_PASTED + 1)]


def augment_batch(images: ImageBatch, params: AugmentParams, side_px: int) -> ImageBatch:
    """Crop, mirror, copy-paste and color-jitter a batch to squares of this size; padding keeps its color."""
    pasted = _paste(_transform(images, params.transforms, side_px), images, params)
    is_padding = _to_pixels(pasted.semantic == PADDING)
    jittered = color_jitter(pasted.pixels, params.color_factors)
    return replace(pasted, pixels=torch.where(is_padding, pasted.pixels, jittered))


def color_jitter(pixels: UInt8[Tensor, "B 3 S S"], factors: Float[Tensor, "B 3"]) -> UInt8[Tensor, "B 3 S S"]:
    """Scale the brightness, then the contrast about the mean gray, then the saturation about each pixel's gray."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    luma = torch.tensor(_LUMA, device=pixels.device)[:, None, None]
    bright = pixels.float() * brightness
    mean = (bright * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    contrasted = mean + (bright - mean) * contrast
    gray = (contrasted * luma).sum(1, keepdim=True)
    return (gray + (contrasted - gray) * saturation).round().clamp(0, 255).to(torch.uint8)


def _transform(images: ImageBatch, transforms: Float[Tensor, "B 2 3"], side_px: int) -> ImageBatch:
    map_side = side_px // MASK_STRIDE_PX
    semantic = _sample(images.semantic[:, None].float(), transforms, map_side, "nearest")[:, 0]
    masks = _sample(images.masks[:, None].float(), transforms[images.image_indices], map_side, "nearest")[:, 0]
    return replace(
        images,
        pixels=_sample(images.pixels.float(), transforms, side_px, "bilinear").round().to(torch.uint8),
        semantic=semantic.round().long(),
        masks=masks > 0.5,
    )


def _paste(base: ImageBatch, images: ImageBatch, params: AugmentParams) -> ImageBatch:
    """Paste instances of `images` into `base`; an instance that is covered by more than half is removed."""
    map_side, side_px = base.masks.shape[-1], base.pixels.shape[-1]
    moved = images.masks[params.pasted_instances][:, None].float()
    transforms = params.paste_transforms[params.target_images]
    masks = _sample(moved, transforms, map_side, "nearest", outside="zeros")[:, 0] > 0.5
    masks = masks & (base.semantic[params.target_images] != PADDING)
    cover = union_by_image(masks, params.target_images, len(base.pixels))
    hidden = cover[base.image_indices]
    is_covered = (base.masks & hidden).flatten(1).sum(1) > _MAX_COVERED * base.masks.flatten(1).sum(1)
    remaining = (base.masks & ~hidden)[~is_covered]
    pixels = _sample(images.pixels[params.source_images].float(), params.paste_transforms, side_px, "bilinear")
    image_indices = torch.cat([base.image_indices[~is_covered], params.target_images])
    order = image_indices.argsort(stable=True)
    return ImageBatch(
        pixels=torch.where(_to_pixels(cover), pixels.round().to(torch.uint8), base.pixels),
        semantic=base.semantic.masked_fill(cover, 0),
        masks=torch.cat([remaining, masks])[order],
        image_indices=image_indices[order],
        clusters=torch.cat([base.clusters[~is_covered], images.clusters[params.pasted_instances]])[order],
        weights=torch.cat([base.weights[~is_covered], images.weights[params.pasted_instances]])[order],
    )


def _to_pixels(maps: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B 1 S S"]:
    return maps.repeat_interleave(MASK_STRIDE_PX, 1).repeat_interleave(MASK_STRIDE_PX, 2)[:, None]


def _sample(
    maps: Float[Tensor, "N C H W"], transforms: Float[Tensor, "N 2 3"], side: int, mode: str, outside: str = "border"
) -> Float[Tensor, "N C side side"]:
    """Resample maps to squares."""
    if not len(maps):
        return maps.new_zeros(0, maps.shape[1], side, side)
    grid = functional.affine_grid(transforms, [len(maps), 1, side, side], align_corners=False)
    return functional.grid_sample(maps, grid, mode=mode, padding_mode=outside, align_corners=False)


def _sample_paste_transform(generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
    """Sample a smaller size and a position anywhere in the square."""
    scale = generator.uniform(_MIN_PASTE_SCALE, 1.0)
    top, left = generator.uniform(0.0, 1.0 - scale, 2)
    x, y = ((1.0 - 2.0 * each - scale) / scale for each in (left, top))
    return np.array([[1.0 / scale, 0.0, x], [0.0, 1.0 / scale, y]], np.float32)
