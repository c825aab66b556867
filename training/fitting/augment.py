"""Labelled photos mirrored and pasted into each other, features, pixels and labels alike."""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float16, Int32, UInt8

from model.network.mask_transformer import STRIDE_PX

MOST_PASTED = 3
_HALVED_RATE = 0.5
_MOST_OVERLAP = 0.5
_LEAST_SHARE, _MOST_SHARE = 0.01, 0.35
"""Of the square: smaller objects have hardly a patch, larger ones leave nothing to see."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One photo in its square, with what is known of it; the arrays are the scene's own."""

    maps: Float16[np.ndarray, "T g g C"]
    square: UInt8[np.ndarray, "3 S S"]
    labels: Int32[np.ndarray, "h w"]
    """Segment ids; 0 is void, -1 no photo."""
    categories: dict[int, int]

    @property
    def step_px(self) -> int:
        """The least shift that keeps patches on patches and cells on cells."""
        return math.lcm(self.square.shape[1] // self.maps.shape[1], STRIDE_PX)


def mirror(scene: Scene) -> Scene:
    """Left and right exchanged; the features are the cached ones turned over, so the encoder need not run again."""
    return replace(
        scene,
        maps=scene.maps[:, :, ::-1].copy(),
        square=scene.square[:, :, ::-1].copy(),
        labels=scene.labels[:, ::-1].copy(),
    )


def halve(scene: Scene) -> Scene:
    """The scene at half its size in the square's upper left; its features are means of four, not a small photo's."""
    grid, side, cells = (each // 2 for each in (scene.maps.shape[1], scene.square.shape[1], scene.labels.shape[0]))
    maps, square, labels = np.zeros_like(scene.maps), np.zeros_like(scene.square), np.full_like(scene.labels, -1)
    blocks = scene.maps[:, : 2 * grid, : 2 * grid].astype(np.float32)
    maps[:, :grid, :grid] = blocks.reshape(len(maps), grid, 2, grid, 2, -1).mean((2, 4))
    pixels = scene.square[:, : 2 * side, : 2 * side].astype(np.float32)
    square[:, :side, :side] = pixels.reshape(3, side, 2, side, 2).mean((2, 4)).round()
    labels[:cells, :cells] = scene.labels[: 2 * cells : 2, : 2 * cells : 2]
    return Scene(maps=maps, square=square, labels=labels, categories=scene.categories)


def paste_objects(scene: Scene, source: Scene, thing_clusters: int, generator: np.random.Generator) -> Scene:
    """The scene with some of the source's things pasted at random places.

    CutLER's copy-paste on cached features: an object brings the patches it lies on. Unlike there it keeps its size or
    is halved, and moves by whole patches. As there, it is left out where it would cover half of a thing.
    """
    if generator.random() < _HALVED_RATE:
        source = halve(source)
    areas = {
        each: float((source.labels == each).mean()) for each, c in source.categories.items() if c <= thing_clusters
    }
    things = [each for each, area in areas.items() if _LEAST_SHARE <= area <= _MOST_SHARE]
    for each in generator.permutation(things)[: generator.integers(1, MOST_PASTED + 1)].tolist():
        rows, columns = _choose_shift(source.labels == each, source, generator)
        scene = _paste(scene, source, each, rows, columns, thing_clusters)
    return scene


def _choose_shift(mask: Bool[np.ndarray, "h w"], source: Scene, generator: np.random.Generator) -> tuple[int, int]:
    """Steps down and right, either way, that keep the object's box inside the square."""
    cells = source.step_px // STRIDE_PX
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    shifts = []
    for first, length, side in ((top, height, mask.shape[0]), (left, width, mask.shape[1])):
        shifts.append(int(generator.integers(-(first // cells), (side - first - length) // cells + 1)))
    return shifts[0], shifts[1]


def _paste(scene: Scene, source: Scene, segment: int, rows: int, columns: int, thing_clusters: int) -> Scene:
    cells, patches = source.step_px // STRIDE_PX, source.step_px * scene.maps.shape[1] // scene.square.shape[1]
    mask = _shift(source.labels == segment, rows * cells, columns * cells) & (scene.labels >= 0)
    for each, category in scene.categories.items():
        existing = scene.labels == each
        if category <= thing_clusters and (existing & mask).sum() > _MOST_OVERLAP * existing.sum():
            return scene
    pixel_mask = mask.repeat(STRIDE_PX, 0).repeat(STRIDE_PX, 1)
    grid = scene.maps.shape[1]
    patch_mask = cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) >= 0.5
    moved = _shift(source.maps, rows * patches, columns * patches, first=1)
    pixels = _shift(source.square, rows * source.step_px, columns * source.step_px, first=1)
    new = max(scene.categories, default=0) + 1
    return Scene(
        maps=np.where(patch_mask[None, :, :, None], moved, scene.maps),
        square=np.where(pixel_mask, pixels, scene.square),
        labels=np.where(mask, np.int32(new), scene.labels),
        categories={**scene.categories, new: source.categories[segment]},
    )


def _shift(array: np.ndarray, rows: int, columns: int, *, first: int = 0) -> np.ndarray:
    """The array moved down and right along the axes `first` and the next, what leaves entering on the other side."""
    return np.roll(array, (rows, columns), axis=(first, first + 1))
