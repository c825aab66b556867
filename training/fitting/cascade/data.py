"""Labelled photos as a cascade is taught by them, the n-th sample of a fit always being the same."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from pycocotools import mask as coco
from torch import Tensor

from model.contract import Canvas
from model.network.simple_pyramid import PATCH_STRIDE_PX
from model.pixels import place, plan_placement, read_photo, resize_labels
from training.features import FeatureCache
from training.fitting.cascade.augment import Example, mirror
from training.fitting.cascade.recipe import CascadeRecipe
from training.fitting.loop.trainee import IGNORE
from training.labels.store import StoredPhoto, read_label

_READERS = 8
"""Threads; photos are decoded outside Python's lock."""


@dataclass(frozen=True, kw_only=True)
class CascadeBatch:
    """Photos of any sizes, resized and mirrored, before any is pasted into another."""

    examples: tuple[Example, ...]
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class CascadeSamples:
    """An endless, seeded walk over the photos: a new order each epoch, half of them mirrored."""

    photos: Sequence[StoredPhoto]
    masks: Mapping[str, Sequence[Mapping[str, Any]]]
    """Whole masks by photo, as `LabelStore.read_masks` gives them."""
    cache: FeatureCache
    thing_clusters: int
    recipe: CascadeRecipe

    def read(self, first: int, count: int) -> CascadeBatch:
        """Samples `first` to `first + count` of the walk."""
        walk = [self._choose(index) for index in range(first, first + count)]
        with ThreadPoolExecutor(_READERS) as readers:
            examples = tuple(readers.map(self._read, *zip(*walk, strict=True)))
        return CascadeBatch(examples=examples, photos=tuple(photo.path for photo, _ in walk))

    def _choose(self, index: int) -> tuple[StoredPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.recipe.seed, epoch, place_in_epoch))

    def _read(self, photo: StoredPhoto, generator: np.random.Generator) -> Example:
        is_mirrored = generator.random() < 0.5
        is_cached = self.recipe.inputs == "features"
        example = self._read_features(photo) if is_cached else self._read_pixels(photo, generator)
        return mirror(example) if is_mirrored else example

    def _read_pixels(self, photo: StoredPhoto, generator: np.random.Generator) -> Example:
        """The photo at one of the recipe's sizes."""
        image = read_photo(photo.path).image
        short_px = int(generator.choice(self.recipe.short_sides_px))
        canvas = plan_size(image.shape[0], image.shape[1], short_px, self.recipe.longest_side_px)
        pixels, placement = place(image, [canvas], 1)
        pixels = pixels[:, : placement.placed_height, : placement.placed_width]
        return self._label(photo, torch.from_numpy(pixels.copy()), 1, placement.size, placement.size)

    def _read_features(self, photo: StoredPhoto) -> Example:
        """What the encoder's last block made of the photo on its square, which is a canvas of so many patches."""
        last = np.asarray(self.cache.read(photo.digest)[-1], dtype=np.float32)
        maps = torch.from_numpy(last).permute(2, 0, 1)  # C g g
        side = maps.shape[1] * PATCH_STRIDE_PX
        height, width = read_label(photo.label).shape
        size = plan_placement(height, width, [Canvas.square(side)], 1).size
        return self._label(photo, maps, PATCH_STRIDE_PX, size, (side, side))

    def _label(
        self, photo: StoredPhoto, inputs: Tensor, cell_px: int, size: tuple[int, int], canvas: tuple[int, int]
    ) -> Example:
        """The labels at the photo's size on a canvas."""
        semantic = np.full(canvas, IGNORE, np.int64)
        semantic[: size[0], : size[1]] = self._map_semantic(photo, size)
        entries = self.masks[photo.digest]
        masks = np.zeros((len(entries), *canvas), bool)
        for mask, entry in zip(masks, entries, strict=True):
            mask[: size[0], : size[1]] = resize_labels(coco.decode(entry["segmentation"]).astype(np.int32), *size) > 0
        is_seen = torch.from_numpy(masks.any((1, 2)))
        numbers = [0 if self.recipe.is_agnostic else entry["category_id"] - 1 for entry in entries]
        return Example(
            inputs=inputs,
            cell_px=cell_px,
            masks=torch.from_numpy(masks)[is_seen],
            clusters=torch.tensor(numbers, dtype=torch.int64)[is_seen],
            semantic=torch.from_numpy(semantic),
        )

    def _map_semantic(self, photo: StoredPhoto, size: tuple[int, int]) -> Int64[np.ndarray, "h w"]:
        labels = resize_labels(read_label(photo.label), *size)
        semantic = np.full(labels.shape, IGNORE, np.int64)
        for segment, category in photo.categories.items():
            semantic[labels == segment] = max(0, category - self.thing_clusters)
        return semantic


def plan_size(height: int, width: int, short_px: int, longest_px: int) -> Canvas:
    """The size of a photo whose shorter side has that length, or whose longer one has the longest allowed."""
    scale = min(short_px / min(height, width), longest_px / max(height, width))
    return Canvas(height_px=max(1, round(height * scale)), width_px=max(1, round(width * scale)))
