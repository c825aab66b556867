"""Labelled photos mirrored and pasted into each other, features, pixels and labels alike."""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float16, Int, Int16, UInt8

from model.network.mask_transformer import STRIDE_PX
from training.fitting.transformer.objects import Objects

VOID, PADDING = -1, -2
"""Cells of a semantic map that have no label, and those that show no photo."""
MOST_PASTED = 3
_HALVED_RATE = 0.5
_MOST_OVERLAP = 0.5
_INSIDE = 0.8
"""Share of a mask in another from which it is a part of that object."""
_LEAST_SHARE, _MOST_SHARE = 0.01, 0.35
"""Of the square: smaller objects have hardly a patch, larger ones leave nothing to see."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One photo in its square, with what is known of it; the arrays are the scene's own."""

    maps: Float16[np.ndarray, "T g g C"]
    square: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    """0 things, s stuff cluster s, VOID or PADDING."""
    objects: Objects

    @property
    def step_px(self) -> int:
        """The least shift that keeps patches on patches and cells on cells."""
        return math.lcm(self.square.shape[1] // self.maps.shape[1], STRIDE_PX)


def mirror(scene: Scene) -> Scene:
    """Left and right exchanged; the features are the cached ones turned over, so the encoder need not run again."""
    return Scene(
        maps=scene.maps[:, :, ::-1].copy(),
        square=scene.square[:, :, ::-1].copy(),
        semantic=scene.semantic[:, ::-1].copy(),
        objects=replace(scene.objects, masks=scene.objects.masks[:, :, ::-1].copy()),
    )


def halve(scene: Scene) -> Scene:
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
    return Scene(maps=maps, square=square, semantic=semantic, objects=replace(scene.objects, masks=masks))


def paste_objects(
    scene: Scene, source: Scene, generator: np.random.Generator, clusters: frozenset[int] | None = None
) -> Scene:
    """The scene with some of the source's surer objects pasted at random places, of these clusters if any are given.

    CutLER's copy-paste on cached features: an object brings the patches it lies on. Unlike there it keeps its size or
    is halved, and moves by whole patches. As there, it is left out where it would cover half of an object; where masks
    overlap, parts would forbid nearly everything: there the object is pasted, and what it half covers goes.
    """
    if generator.random() < _HALVED_RATE:
        source = halve(source)
    for each in generator.permutation(list_fitting(source.objects, clusters))[: generator.integers(1, MOST_PASTED + 1)]:
        rows, columns = _choose_shift(source.objects.masks[each], source, generator)
        scene = _paste(scene, source, int(each), rows, columns)
    return scene


def list_fitting(objects: Objects, clusters: frozenset[int] | None) -> Int[np.ndarray, "n"]:
    """Places of the objects that have a fitting size and at least the middle weight."""
    areas = objects.masks.mean((1, 2))
    is_fitting = (areas >= _LEAST_SHARE) & (areas <= _MOST_SHARE)
    if len(objects):
        is_fitting &= objects.weights >= np.median(objects.weights)
    if clusters is not None:
        is_fitting &= np.isin(objects.clusters, list(clusters))
    return np.flatnonzero(is_fitting)


def _choose_shift(mask: Bool[np.ndarray, "h w"], source: Scene, generator: np.random.Generator) -> tuple[int, int]:
    """Steps down and right, either way, that keep the object's box inside the square."""
    cells = source.step_px // STRIDE_PX
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    shifts = []
    for first, length, side in ((top, height, mask.shape[0]), (left, width, mask.shape[1])):
        shifts.append(int(generator.integers(-(first // cells), (side - first - length) // cells + 1)))
    return shifts[0], shifts[1]


def _paste(scene: Scene, source: Scene, index: int, rows: int, columns: int) -> Scene:
    cells, patches = source.step_px // STRIDE_PX, source.step_px * scene.maps.shape[1] // scene.square.shape[1]
    mask = _shift(source.objects.masks[index], rows * cells, columns * cells) & (scene.semantic != PADDING)
    existing = scene.objects
    is_lost = (existing.masks & mask).sum((1, 2)) > _MOST_OVERLAP * existing.masks.sum((1, 2))
    if is_lost.any() and not _overlap(existing):
        return scene
    brought = _list_parts(source.objects, index)
    moved_masks = _shift(brought.masks, rows * cells, columns * cells, first=1) & mask
    pixel_mask = mask.repeat(STRIDE_PX, 0).repeat(STRIDE_PX, 1)
    grid = scene.maps.shape[1]
    patch_mask = cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) >= 0.5
    moved = _shift(source.maps, rows * patches, columns * patches, first=1)
    pixels = _shift(source.square, rows * source.step_px, columns * source.step_px, first=1)
    return Scene(
        maps=np.where(patch_mask[None, :, :, None], moved, scene.maps),
        square=np.where(pixel_mask, pixels, scene.square),
        semantic=np.where(mask, np.int16(0), scene.semantic),
        objects=existing.pick(~is_lost).hide(mask).join(replace(brought, masks=moved_masks)),
    )


def _overlap(objects: Objects) -> bool:
    return bool((objects.masks.sum(0) > 1).any())


def _list_parts(objects: Objects, index: int) -> Objects:
    """An object, and after it those that lie in it."""
    shared, sizes = (objects.masks & objects.masks[index]).sum((1, 2)), objects.masks.sum((1, 2))
    is_part = (shared >= _INSIDE * sizes) & (sizes > 0)
    is_part[index] = False
    return objects.pick(np.concatenate([[index], np.flatnonzero(is_part)]))


def _shift(array: np.ndarray, rows: int, columns: int, *, first: int = 0) -> np.ndarray:
    """The array moved down and right along the axes `first` and the next, what leaves entering on the other side."""
    return np.roll(array, (rows, columns), axis=(first, first + 1))
