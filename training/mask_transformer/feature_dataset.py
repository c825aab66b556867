"""Training samples on cached encoder features, with copy-paste and crops on the features themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float16
from torch import Tensor

from model.images import read_image
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.samples import (
    MAX_PASTED,
    PADDING,
    ImageBatch,
    Instances,
    LabelReader,
    Sample,
    collate,
    full_view,
    sample_crop,
)
from training.trainer.task import PhotoSampler, TrainingBatch

_HALF_SIZE_PROB = 0.5
_MAX_COVERED = 0.5
"""Fraction of an instance that a pasted one may cover."""
_INSIDE = 0.8
"""Fraction of a mask inside another from which it counts as a part of that instance."""


@dataclass(frozen=True, kw_only=True)
class FeatureBatch(TrainingBatch):
    """Samples with the features that the encoder computes for them."""

    features: Float[Tensor, "T B N C"]
    images: ImageBatch


@dataclass(frozen=True, kw_only=True)
class FeatureSample(Sample):
    """A sample with cached features."""

    features: Float16[np.ndarray, "T g g C"]

    @property
    def shift_px(self) -> int:
        """Smallest shift that keeps both patches and map pixels aligned."""
        return math.lcm(self.pixels.shape[1] // self.features.shape[1], MASK_STRIDE_PX)

    def halve(self) -> "FeatureSample":
        """Shrink to half size into the upper left; features are averaged, unlike those of a smaller photo."""
        grid, side, map_side = (
            each // 2 for each in (self.features.shape[1], self.pixels.shape[1], self.semantic.shape[0])
        )
        features, pixels = np.zeros_like(self.features), np.zeros_like(self.pixels)
        semantic, masks = np.full_like(self.semantic, PADDING), np.zeros_like(self.instances.masks)
        blocks = self.features[:, : 2 * grid, : 2 * grid].astype(np.float32)
        features[:, :grid, :grid] = blocks.reshape(len(features), grid, 2, grid, 2, -1).mean((2, 4))
        large = self.pixels[:, : 2 * side, : 2 * side].astype(np.float32)
        pixels[:, :side, :side] = large.reshape(3, side, 2, side, 2).mean((2, 4)).round()
        semantic[:map_side, :map_side] = self.semantic[: 2 * map_side : 2, : 2 * map_side : 2]
        masks[:, :map_side, :map_side] = self.instances.masks[:, : 2 * map_side : 2, : 2 * map_side : 2]
        instances = replace(self.instances, masks=masks)
        return FeatureSample(features=features, pixels=pixels, semantic=semantic, instances=instances)


@dataclass(frozen=True)
class FeatureDataset:
    """Augmented samples of a label dataset, from cached features."""

    sampler: PhotoSampler
    cache: FeatureCache
    labels: LabelReader
    side_px: int
    """Side of the encoder's input."""
    config: MaskTransformerTrainConfig

    def load_batch(self, first: int, count: int) -> FeatureBatch:
        """Load samples `first` to `first + count`."""
        photos, generators = self.sampler.sample(first, count)
        samples = list(map(self._load_sample, photos, generators))
        return FeatureBatch(
            features=torch.stack([torch.from_numpy(each.features).flatten(1, 2) for each in samples], dim=1).float(),
            images=collate(samples),
            photos=tuple(photo.path for photo in photos),
        )

    def _load_sample(self, photo: LabeledPhoto, generator: np.random.Generator) -> FeatureSample:
        """Load a photo and, with the configured probability, paste instances of another one into it."""
        sample = self._load_photo(photo, generator)
        if generator.random() >= self.config.copy_paste_prob:
            return sample
        photos = self.sampler.photos
        clusters = self.labels.clusters(photo) if self.config.copy_paste_same_class else frozenset()
        others = sorted({index for cluster in clusters for index in self._photos_by_cluster[cluster]})
        others = [index for index in others if photos[index].digest != photo.digest]
        position = int(generator.integers(len(others) or len(photos)))
        source = self._load_photo(photos[others[position] if others else position], generator)
        return copy_paste(sample, source, generator, clusters if others else None)

    def _load_photo(self, photo: LabeledPhoto, generator: np.random.Generator) -> FeatureSample:
        """Load a photo, or a crop of it, mirrored with a probability of one half."""
        is_mirrored = generator.random() < 0.5
        features = self.cache.read(photo.digest)
        view = full_view(photo.height, photo.width, self.side_px, features.shape[1])
        if self.config.crop_prob and generator.random() < self.config.crop_prob:
            view = sample_crop(view, generator)
        view = replace(view, is_mirrored=is_mirrored)
        semantic, instances = self.labels.read(photo, view)
        return FeatureSample(
            features=view.crop_features(features),
            pixels=view.crop_image(read_image(photo.path).image),
            semantic=semantic,
            instances=instances,
        )

    @cached_property
    def _photos_by_cluster(self) -> Mapping[int, list[int]]:
        """Indices of the photos that have an instance of each cluster."""
        found: dict[int, list[int]] = {}
        for index, photo in enumerate(self.sampler.photos):
            for cluster in self.labels.clusters(photo):
                found.setdefault(cluster, []).append(index)
        return found


def copy_paste(
    sample: FeatureSample,
    source: FeatureSample,
    generator: np.random.Generator,
    clusters: frozenset[int] | None = None,
) -> FeatureSample:
    """Paste some instances of another sample at random positions, only of these clusters if given.

    CutLER's copy-paste, applied to features: an instance brings the patches that it covers. Unlike in CutLER it keeps
    its size or is halved, and moves by whole patches. As there, it is skipped if it would cover half of another
    instance; where masks overlap, this would skip nearly all of them, so the covered instance is removed instead.
    """
    if generator.random() < _HALF_SIZE_PROB:
        source = source.halve()
    pasteable = generator.permutation(source.instances.find_pasteable(clusters))
    for index in pasteable[: generator.integers(1, MAX_PASTED + 1)]:
        rows, columns = _sample_shift(source.instances.masks[index], source, generator)
        sample = _paste_instance(sample, source, int(index), rows, columns)
    return sample


def _sample_shift(
    mask: Bool[np.ndarray, "h w"], source: FeatureSample, generator: np.random.Generator
) -> tuple[int, int]:
    """Sample how many times `shift_px` the mask moves down and right, such that it stays in the image."""
    unit = source.shift_px // MASK_STRIDE_PX
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    shifts = []
    for first, length, side in ((top, height, mask.shape[0]), (left, width, mask.shape[1])):
        shifts.append(int(generator.integers(-(first // unit), (side - first - length) // unit + 1)))
    return shifts[0], shifts[1]


def _paste_instance(sample: FeatureSample, source: FeatureSample, index: int, rows: int, columns: int) -> FeatureSample:
    unit, grid = source.shift_px // MASK_STRIDE_PX, sample.features.shape[1]
    patches = source.shift_px * grid // sample.pixels.shape[1]
    mask = np.roll(source.instances.masks[index], (rows * unit, columns * unit), (0, 1)) & (sample.semantic != PADDING)
    existing = sample.instances
    is_covered = (existing.masks & mask).sum((1, 2)) > _MAX_COVERED * existing.masks.sum((1, 2))
    if is_covered.any() and (existing.masks.sum(0) <= 1).all():
        return sample
    pasted = _with_parts(source.instances, index)
    moved_masks = np.roll(pasted.masks, (rows * unit, columns * unit), (1, 2)) & mask
    pixel_mask = mask.repeat(MASK_STRIDE_PX, 0).repeat(MASK_STRIDE_PX, 1)
    patch_mask = cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) >= 0.5
    features = np.roll(source.features, (rows * patches, columns * patches), (1, 2))
    pixels = np.roll(source.pixels, (rows * source.shift_px, columns * source.shift_px), (1, 2))
    return FeatureSample(
        features=np.where(patch_mask[None, :, :, None], features, sample.features),
        pixels=np.where(pixel_mask, pixels, sample.pixels),
        semantic=np.where(mask, np.int16(0), sample.semantic),
        instances=Instances(
            masks=np.concatenate([existing.masks[~is_covered] & ~mask, moved_masks]),
            clusters=np.concatenate([existing.clusters[~is_covered], pasted.clusters]),
            weights=np.concatenate([existing.weights[~is_covered], pasted.weights]),
        ),
    )


def _with_parts(instances: Instances, index: int) -> Instances:
    """Return an instance, followed by those that lie in it."""
    shared, sizes = (instances.masks & instances.masks[index]).sum((1, 2)), instances.masks.sum((1, 2))
    is_part = (shared >= _INSIDE * sizes) & (sizes > 0)
    is_part[index] = False
    return instances.select(np.concatenate([[index], np.flatnonzero(is_part)]))
