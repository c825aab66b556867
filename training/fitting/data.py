"""Labelled photos as tensors, the n-th sample of a fit always being the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from model.contract import Canvas
from model.network.mask_transformer import STRIDE_PX
from model.pixels import Placement, place, read_photo, resize_labels
from training.features import FeatureCache
from training.fitting.augment import Scene, mirror, paste_objects
from training.labels.store import StoredPhoto, read_label

IGNORE = -1
"""Of the semantic target; 255, which files use, may be a cluster here."""
_LEAST_CELLS = 4
_BAND = np.ones((5, 5), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one photo should be answered with, at the mask stride."""

    masks: Float[Tensor, "M h w"]
    clusters: Int[Tensor, "M"]
    """Counted from 0."""
    semantic: Int[Tensor, "h w"]
    """0 things, s stuff cluster s, IGNORE elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of the decoder and their targets."""

    features: Float[Tensor, "T B N C"]
    pixels: UInt8[Tensor, "B 3 S S"]
    targets: tuple[Target, ...]
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """An endless, seeded walk over the photos: a new order each epoch, half of them mirrored, some pasted into."""

    photos: Sequence[StoredPhoto]
    cache: FeatureCache
    side_px: int
    thing_clusters: int
    seed: int
    paste_rate: float
    """Share of the samples that receive objects of another photo."""

    def read(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the walk."""
        walk = [self._choose(index) for index in range(first, first + count)]
        scenes = [self._read(photo, generator) for photo, generator in walk]
        return Batch(
            features=torch.stack([torch.from_numpy(each.maps).flatten(1, 2) for each in scenes], dim=1).float(),
            pixels=torch.stack([torch.from_numpy(each.square) for each in scenes]),
            targets=tuple(make_target(each.labels, each.categories, self.thing_clusters) for each in scenes),
            photos=tuple(photo.path for photo, _ in walk),
        )

    def _choose(self, index: int) -> tuple[StoredPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.seed, epoch, place_in_epoch))

    def _read(self, photo: StoredPhoto, generator: np.random.Generator) -> Scene:
        scene = self._open(photo, is_mirrored=generator.random() < 0.5)
        if generator.random() < self.paste_rate:
            other = self.photos[int(generator.integers(len(self.photos)))]
            source = self._open(other, is_mirrored=generator.random() < 0.5)
            scene = paste_objects(scene, source, self.thing_clusters, generator)
        return scene

    def _open(self, photo: StoredPhoto, *, is_mirrored: bool) -> Scene:
        square, placement = place(read_photo(photo.path).image, [Canvas.square(self.side_px)], STRIDE_PX)
        scene = Scene(
            maps=np.array(self.cache.read(photo.digest)),
            square=square,
            labels=place_labels(read_label(photo.label), placement),
            categories=photo.categories,
        )
        return mirror(scene) if is_mirrored else scene


def place_labels(labels: Int32[np.ndarray, "H W"], placement: Placement) -> Int32[np.ndarray, "h w"]:
    """A label map at the stride of the square; -1 where the square shows no photo."""
    side = placement.canvas.width_px // placement.stride_px
    square = np.full((side, side), -1, np.int32)
    square[: placement.map_height, : placement.map_width] = resize_labels(
        labels, placement.map_height, placement.map_width
    )
    return square


def make_target(labels: Int32[np.ndarray, "h w"], categories: dict[int, int], thing_clusters: int) -> Target:
    """Masks of things that still have a few cells; void, padding and a band of stuff around things are ignored.

    The band: features of patches beside an object look like the object, and stuff labels there are halos.
    """
    things = [each for each, category in categories.items() if category <= thing_clusters]
    things = [each for each in things if (labels == each).sum() >= _LEAST_CELLS]
    semantic = np.full(labels.shape, IGNORE, np.int64)
    for segment, category in categories.items():
        semantic[labels == segment] = max(0, category - thing_clusters)
    is_thing = (semantic == 0).astype(np.uint8)
    semantic[(cv2.dilate(is_thing, _BAND) > 0) & (is_thing == 0)] = IGNORE
    masks = np.array([labels == each for each in things], np.float32).reshape(len(things), *labels.shape)
    return Target(
        masks=torch.from_numpy(masks),
        clusters=torch.tensor([categories[each] - 1 for each in things], dtype=torch.int64),
        semantic=torch.from_numpy(semantic),
    )
