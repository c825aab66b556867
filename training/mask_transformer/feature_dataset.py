"""Labelled photos as tensors, the n-th sample of a fit always being the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, Int16, Int32, UInt8
from torch import Tensor

from model.images import read_image
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.dataset import LabeledPhoto, read_label_map
from training.data.features import FeatureCache
from training.mask_transformer.crops import crop_view, full_view, sample_crop
from training.mask_transformer.instances import InstanceMasks, Instances, instances_from_panoptic
from training.trainer.task import IGNORE_INDEX

MIN_MASK_CELLS = 4
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
class DecoderBatch:
    """Inputs of the decoder and their targets."""

    features: Float[Tensor, "T B N C"]
    pixels: UInt8[Tensor, "B 3 S S"]
    targets: tuple[Target, ...]
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureSample:
    """One photo in its square, with what is known of it; the arrays are the scene's own."""

    maps: Float16[np.ndarray, "T g g C"]
    square: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    """0 things, s stuff cluster s, VOID or PADDING."""
    objects: Instances

    @property
    def step_px(self) -> int:
        """The least shift that keeps patches on patches and cells on cells."""
        return math.lcm(self.square.shape[1] // self.maps.shape[1], MASK_STRIDE_PX)


@dataclass(frozen=True, kw_only=True)
class FeatureDataset:
    """An endless, seeded walk over the photos: a new order each epoch, half of them mirrored, some pasted into."""

    photos: Sequence[LabeledPhoto]
    cache: FeatureCache
    side_px: int
    thing_clusters: int
    seed: int
    paste_rate: float
    """Share of the samples that receive objects of another photo."""
    crop_rate: float = 0.0
    """Share of the photos of which a window is shown."""
    whole_masks: InstanceMasks | None = None
    """Objects with what others hide of them; without, they are what shows in the panoptic maps."""
    pastes_alike: bool = False
    """Paste objects of clusters that the sample has, if another photo has such."""
    drops_unknown: bool = False
    """Ask nothing of queries that matched nothing where nothing is labelled."""

    def read(self, first: int, count: int) -> DecoderBatch:
        """Samples `first` to `first + count` of the walk."""
        walk = [self._choose(index) for index in range(first, first + count)]
        scenes = [self._read(photo, generator) for photo, generator in walk]
        return DecoderBatch(
            features=torch.stack([torch.from_numpy(each.maps).flatten(1, 2) for each in scenes], dim=1).float(),
            pixels=torch.stack([torch.from_numpy(each.square) for each in scenes]),
            targets=tuple(make_target(each, drops_unknown=self.drops_unknown) for each in scenes),
            photos=tuple(photo.path for photo, _ in walk),
        )

    def _choose(self, index: int) -> tuple[LabeledPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.seed, epoch, place_in_epoch))

    def _read(self, photo: LabeledPhoto, generator: np.random.Generator) -> FeatureSample:
        scene = self._open(photo, generator)
        if generator.random() < self.paste_rate:
            wanted = self._list_things(photo) if self.pastes_alike else frozenset()
            others = sorted({index for cluster in wanted for index in self._photos_with[cluster]})
            others = [index for index in others if self.photos[index].digest != photo.digest]
            place = int(generator.integers(len(others) or len(self.photos)))
            source = self._open(self.photos[others[place] if others else place], generator)
            scene = copy_paste(scene, source, generator, wanted if others else None)
        return scene

    def _open(self, photo: LabeledPhoto, generator: np.random.Generator) -> FeatureSample:
        picture = read_image(photo.path)
        is_mirrored = generator.random() < 0.5
        maps = self.cache.read(photo.digest)
        frame = full_view(picture.height, picture.width, self.side_px)
        if self.crop_rate and generator.random() < self.crop_rate:
            frame = crop_view(frame, maps.shape[1], sample_crop(frame, maps.shape[1], generator))
        labels = frame.cut_cells(read_label_map(photo.label), -1)
        whole = self.whole_masks
        scene = FeatureSample(
            maps=frame.cut_maps(maps),
            square=frame.cut_pixels(picture.image),
            semantic=make_semantic_map(labels, photo.categories, self.thing_clusters),
            objects=whole.show(photo.digest, frame)
            if whole
            else instances_from_panoptic(labels, photo.categories, self.thing_clusters),
        )
        return hflip_features(scene) if is_mirrored else scene

    def _list_things(self, photo: LabeledPhoto) -> frozenset[int]:
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


def make_semantic_map(
    labels: Int32[np.ndarray, "h w"], categories: Mapping[int, int], thing_clusters: int
) -> Int16[np.ndarray, "h w"]:
    """A panoptic map, -1 where no photo is, as a scene's semantic map."""
    semantic = np.where(labels < 0, np.int16(PADDING), np.int16(VOID))
    for segment, category in categories.items():
        semantic[labels == segment] = max(0, category - thing_clusters)
    return semantic


def make_target(scene: FeatureSample, *, drops_unknown: bool) -> Target:
    """Masks of objects that still have a few cells; void, padding and a band of stuff around things are ignored.

    The band: features of patches beside an object look like the object, and stuff labels there are halos. With
    `drops_unknown`, only stuff, objects and what shows no photo are known.
    """
    objects = scene.objects.pick(scene.objects.masks.sum((1, 2)) >= MIN_MASK_CELLS)
    semantic = np.where(scene.semantic < 0, IGNORE_INDEX, scene.semantic).astype(np.int64)
    is_thing = (semantic == 0).astype(np.uint8)
    semantic[(cv2.dilate(is_thing, _BAND) > 0) & (is_thing == 0)] = IGNORE_INDEX
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


VOID, PADDING = -1, -2
"""Cells of a semantic map that have no label, and those that show no photo."""
MAX_PASTED = 3
_HALVED_RATE = 0.5
_MOST_OVERLAP = 0.5
_INSIDE = 0.8
"""Share of a mask in another from which it is a part of that object."""
_LEAST_SHARE, _MOST_SHARE = 0.01, 0.35
"""Of the square: smaller objects have hardly a patch, larger ones leave nothing to see."""


def hflip_features(scene: FeatureSample) -> FeatureSample:
    """Left and right exchanged; the features are the cached ones turned over, so the encoder need not run again."""
    return FeatureSample(
        maps=scene.maps[:, :, ::-1].copy(),
        square=scene.square[:, :, ::-1].copy(),
        semantic=scene.semantic[:, ::-1].copy(),
        objects=replace(scene.objects, masks=scene.objects.masks[:, :, ::-1].copy()),
    )


def halve(scene: FeatureSample) -> FeatureSample:
    """The scene at half its size in the square's upper left; its features are means of four, not a small photo's."""
    grid, side, cells = (each // 2 for each in (scene.maps.shape[1], scene.square.shape[1], scene.semantic.shape[0]))
    maps, square = np.zeros_like(scene.maps), np.zeros_like(scene.square)
    semantic, masks = np.full_like(scene.semantic, PADDING), np.zeros_like(scene.objects.masks)
    blocks = scene.maps[:, : 2 * grid, : 2 * grid].astype(np.float32)
    maps[:, :grid, :grid] = blocks.reshape(len(maps), grid, 2, grid, 2, -1).mean((2, 4))
    pixels = scene.square[:, : 2 * side, : 2 * side].astype(np.float32)
    square[:, :side, :side] = pixels.reshape(3, side, 2, side, 2).mean((2, 4)).round()
    semantic[:cells, :cells] = scene.semantic[: 2 * cells : 2, : 2 * cells : 2]
    masks[:, :cells, :cells] = scene.objects.masks[:, : 2 * cells : 2, : 2 * cells : 2]
    return FeatureSample(maps=maps, square=square, semantic=semantic, objects=replace(scene.objects, masks=masks))


def copy_paste(
    scene: FeatureSample, source: FeatureSample, generator: np.random.Generator, clusters: frozenset[int] | None = None
) -> FeatureSample:
    """The scene with some of the source's surer objects pasted at random places, of these clusters if any are given.

    CutLER's copy-paste on cached features: an object brings the patches it lies on. Unlike there it keeps its size or
    is halved, and moves by whole patches. As there, it is left out where it would cover half of an object; where masks
    overlap, parts would forbid nearly everything: there the object is pasted, and what it half covers goes.
    """
    if generator.random() < _HALVED_RATE:
        source = halve(source)
    for each in generator.permutation(list_pasteable(source.objects, clusters))[
        : generator.integers(1, MAX_PASTED + 1)
    ]:
        rows, columns = _choose_shift(source.objects.masks[each], source, generator)
        scene = _paste(scene, source, int(each), rows, columns)
    return scene


def list_pasteable(objects: Instances, clusters: frozenset[int] | None) -> Int[np.ndarray, "n"]:
    """Places of the objects that have a fitting size and at least the middle weight."""
    areas = objects.masks.mean((1, 2))
    is_fitting = (areas >= _LEAST_SHARE) & (areas <= _MOST_SHARE)
    if len(objects):
        is_fitting &= objects.weights >= np.median(objects.weights)
    if clusters is not None:
        is_fitting &= np.isin(objects.clusters, list(clusters))
    return np.flatnonzero(is_fitting)


def _choose_shift(
    mask: Bool[np.ndarray, "h w"], source: FeatureSample, generator: np.random.Generator
) -> tuple[int, int]:
    """Steps down and right, either way, that keep the object's box inside the square."""
    cells = source.step_px // MASK_STRIDE_PX
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    shifts = []
    for first, length, side in ((top, height, mask.shape[0]), (left, width, mask.shape[1])):
        shifts.append(int(generator.integers(-(first // cells), (side - first - length) // cells + 1)))
    return shifts[0], shifts[1]


def _paste(scene: FeatureSample, source: FeatureSample, index: int, rows: int, columns: int) -> FeatureSample:
    cells, patches = source.step_px // MASK_STRIDE_PX, source.step_px * scene.maps.shape[1] // scene.square.shape[1]
    mask = _shift(source.objects.masks[index], rows * cells, columns * cells) & (scene.semantic != PADDING)
    existing = scene.objects
    is_lost = (existing.masks & mask).sum((1, 2)) > _MOST_OVERLAP * existing.masks.sum((1, 2))
    if is_lost.any() and not _overlap(existing):
        return scene
    brought = _list_parts(source.objects, index)
    moved_masks = _shift(brought.masks, rows * cells, columns * cells, first=1) & mask
    pixel_mask = mask.repeat(MASK_STRIDE_PX, 0).repeat(MASK_STRIDE_PX, 1)
    grid = scene.maps.shape[1]
    patch_mask = cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) >= 0.5
    moved = _shift(source.maps, rows * patches, columns * patches, first=1)
    pixels = _shift(source.square, rows * source.step_px, columns * source.step_px, first=1)
    return FeatureSample(
        maps=np.where(patch_mask[None, :, :, None], moved, scene.maps),
        square=np.where(pixel_mask, pixels, scene.square),
        semantic=np.where(mask, np.int16(0), scene.semantic),
        objects=existing.pick(~is_lost).hide(mask).join(replace(brought, masks=moved_masks)),
    )


def _overlap(objects: Instances) -> bool:
    return bool((objects.masks.sum(0) > 1).any())


def _list_parts(objects: Instances, index: int) -> Instances:
    """An object, and after it those that lie in it."""
    shared, sizes = (objects.masks & objects.masks[index]).sum((1, 2)), objects.masks.sum((1, 2))
    is_part = (shared >= _INSIDE * sizes) & (sizes > 0)
    is_part[index] = False
    return objects.pick(np.concatenate([[index], np.flatnonzero(is_part)]))


def _shift(array: np.ndarray, rows: int, columns: int, *, first: int = 0) -> np.ndarray:
    """The array moved down and right along the axes `first` and the next, what leaves entering on the other side."""
    return np.roll(array, (rows, columns), axis=(first, first + 1))
