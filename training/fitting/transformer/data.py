"""Labelled photos as tensors, the n-th sample of a fit always being the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int16, Int32, UInt8
from torch import Tensor

from model.pixels import read_photo
from training.features import FeatureCache
from training.fitting.loop.trainee import IGNORE
from training.fitting.transformer.augment import PADDING, VOID, Scene, mirror, paste_objects
from training.fitting.transformer.frame import draw_window, show_all, show_window
from training.fitting.transformer.objects import WholeMasks, read_merged
from training.labels.store import StoredPhoto, read_label

LEAST_CELLS = 4
"""Of an object."""
_BAND = np.ones((5, 5), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one photo should be answered with, at the mask stride."""

    masks: Float[Tensor, "M h w"]
    clusters: Int[Tensor, "M"]
    """Counted from 0."""
    weights: Float[Tensor, "M"]
    """How much each mask counts, 0..1."""
    semantic: Int[Tensor, "h w"]
    """0 things, s stuff cluster s, IGNORE elsewhere."""
    known: Bool[Tensor, "h w"]
    """Where a query that matched nothing is wrong; elsewhere it may have found what has no label."""
    vectors: Float[Tensor, "M D"] | None = None
    """What the masks hold, of unit length, if queries are taught that."""


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
    crop_rate: float = 0.0
    """Share of the photos of which a window is shown."""
    whole_masks: WholeMasks | None = None
    """Objects with what others hide of them; without, they are what shows in the panoptic maps."""
    pastes_alike: bool = False
    """Paste objects of clusters that the sample has, if another photo has such."""
    drops_unknown: bool = False
    """Ask nothing of queries that matched nothing where nothing is labelled."""

    def read(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the walk."""
        walk = [self._choose(index) for index in range(first, first + count)]
        scenes = [self._read(photo, generator) for photo, generator in walk]
        return Batch(
            features=torch.stack([torch.from_numpy(each.maps).flatten(1, 2) for each in scenes], dim=1).float(),
            pixels=torch.stack([torch.from_numpy(each.square) for each in scenes]),
            targets=tuple(make_target(each, drops_unknown=self.drops_unknown) for each in scenes),
            photos=tuple(photo.path for photo, _ in walk),
        )

    def _choose(self, index: int) -> tuple[StoredPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.seed, epoch, place_in_epoch))

    def _read(self, photo: StoredPhoto, generator: np.random.Generator) -> Scene:
        scene = self._open(photo, generator)
        if generator.random() < self.paste_rate:
            wanted = self._list_things(photo) if self.pastes_alike else frozenset()
            others = sorted({index for cluster in wanted for index in self._photos_with[cluster]})
            others = [index for index in others if self.photos[index].digest != photo.digest]
            place = int(generator.integers(len(others) or len(self.photos)))
            source = self._open(self.photos[others[place] if others else place], generator)
            scene = paste_objects(scene, source, generator, wanted if others else None)
        return scene

    def _open(self, photo: StoredPhoto, generator: np.random.Generator) -> Scene:
        picture = read_photo(photo.path)
        is_mirrored = generator.random() < 0.5
        maps = self.cache.read(photo.digest)
        frame = show_all(picture.height, picture.width, self.side_px)
        if self.crop_rate and generator.random() < self.crop_rate:
            frame = show_window(frame, maps.shape[1], draw_window(frame, maps.shape[1], generator))
        labels = frame.cut_cells(read_label(photo.label), -1)
        whole = self.whole_masks
        scene = Scene(
            maps=frame.cut_maps(maps),
            square=frame.cut_pixels(picture.image),
            semantic=read_semantic(labels, photo.categories, self.thing_clusters),
            objects=whole.show(photo.digest, frame)
            if whole
            else read_merged(labels, photo.categories, self.thing_clusters),
        )
        return mirror(scene) if is_mirrored else scene

    def _list_things(self, photo: StoredPhoto) -> frozenset[int]:
        if self.whole_masks:
            return self.whole_masks.list_clusters(photo.digest)
        return frozenset(each for each in photo.categories.values() if each <= self.thing_clusters)

    @cached_property
    def _photos_with(self) -> Mapping[int, list[int]]:
        """Places of the photos with an object of each cluster."""
        found: dict[int, list[int]] = {}
        for index, photo in enumerate(self.photos):
            for cluster in self._list_things(photo):
                found.setdefault(cluster, []).append(index)
        return found


def read_semantic(
    labels: Int32[np.ndarray, "h w"], categories: Mapping[int, int], thing_clusters: int
) -> Int16[np.ndarray, "h w"]:
    """A panoptic map, -1 where no photo is, as a scene's semantic map."""
    semantic = np.where(labels < 0, np.int16(PADDING), np.int16(VOID))
    for segment, category in categories.items():
        semantic[labels == segment] = max(0, category - thing_clusters)
    return semantic


def make_target(scene: Scene, *, drops_unknown: bool) -> Target:
    """Masks of objects that still have a few cells; void, padding and a band of stuff around things are ignored.

    The band: features of patches beside an object look like the object, and stuff labels there are halos. With
    `drops_unknown`, only stuff, objects and what shows no photo are known.
    """
    objects = scene.objects.pick(scene.objects.masks.sum((1, 2)) >= LEAST_CELLS)
    semantic = np.where(scene.semantic < 0, IGNORE, scene.semantic).astype(np.int64)
    is_thing = (semantic == 0).astype(np.uint8)
    semantic[(cv2.dilate(is_thing, _BAND) > 0) & (is_thing == 0)] = IGNORE
    known = np.ones(semantic.shape, bool)
    if drops_unknown:
        known = (scene.semantic > 0) | (scene.semantic == PADDING) | objects.masks.any(0)
    return Target(
        masks=torch.from_numpy(objects.masks.astype(np.float32)),
        clusters=torch.from_numpy(objects.clusters - 1),
        weights=torch.from_numpy(objects.weights),
        semantic=torch.from_numpy(semantic),
        known=torch.from_numpy(known),
    )
