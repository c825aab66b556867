"""Labelled photos as pictures, with what chance says of each: the n-th sample of a fit always being the same."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int, Int16, UInt8

from model.network.mask_transformer import STRIDE_PX
from model.pixels import read_photo
from training.fitting.transformer.augment import MOST_PASTED, list_fitting
from training.fitting.transformer.data import read_semantic
from training.fitting.transformer.frame import show_all
from training.fitting.transformer.objects import Objects, WholeMasks, read_merged
from training.fitting.transformer.pictures import Drawn, Pictures
from training.labels.store import StoredPhoto, read_label

_READERS = 8
"""Threads; photos are decoded outside Python's lock."""
_LEAST_AREA = 0.4
"""Of the square, that a crop shows."""
_LEAST_RATIO = 0.3
"""Of its size, that a pasted object shrinks to."""


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """Photos before anything is done to them, and what is to be done."""

    pictures: Pictures
    drawn: Drawn
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One photo on a square somewhat larger than the network's, so that crops are sharp."""

    square: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    objects: Objects
    extent: tuple[float, float]
    """Shares of the square's height and width that show the photo."""


@dataclass(frozen=True, kw_only=True)
class PixelSamples:
    """An endless, seeded walk over the photos: a new order each epoch. Photos once opened are kept."""

    photos: Sequence[StoredPhoto]
    side_px: int
    thing_clusters: int
    seed: int
    paste_rate: float
    crop_rate: float
    jitter: float
    pastes_alike: bool
    whole_masks: WholeMasks | None
    _kept: dict[str, Opened] = field(default_factory=dict)

    @property
    def canvas_px(self) -> int:
        """Side of the squares."""
        return math.ceil(self.side_px * 8 / 7 / STRIDE_PX) * STRIDE_PX

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

    def _choose(self, index: int) -> tuple[StoredPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.seed, epoch, place_in_epoch))

    def _open(self, photo: StoredPhoto) -> Opened:
        if photo.digest in self._kept:
            return self._kept[photo.digest]
        picture = read_photo(photo.path)
        frame = show_all(picture.height, picture.width, self.canvas_px)
        labels = frame.cut_cells(read_label(photo.label), -1)
        whole = self.whole_masks
        height, width = frame.placement.size
        opened = Opened(
            square=frame.cut_pixels(picture.image),
            semantic=read_semantic(labels, photo.categories, self.thing_clusters),
            objects=whole.show(photo.digest, frame)
            if whole
            else read_merged(labels, photo.categories, self.thing_clusters),
            extent=(height / self.canvas_px, width / self.canvas_px),
        )
        return self._kept.setdefault(photo.digest, opened)

    def _draw(self, opened: Sequence[Opened], generators: Sequence[np.random.Generator]) -> Drawn:
        views = [self._draw_view(each, generator) for each, generator in zip(opened, generators, strict=True)]
        colours = [generator.uniform(1.0 - self.jitter, 1.0 + self.jitter, 3) for generator in generators]
        starts = np.cumsum([0, *(len(each.objects) for each in opened)])
        sources, pasted, receivers = list(range(len(opened))), [], []
        for place, generator in enumerate(generators):
            if generator.random() < self.paste_rate:
                sources[place], chosen = self._choose_pasted(opened, place, generator)
                pasted += (starts[sources[place]] + chosen).tolist()
                receivers += [place] * len(chosen)
        return Drawn(
            views=torch.from_numpy(np.stack(views)),
            colours=torch.from_numpy(np.stack(colours).astype(np.float32)),
            sources=torch.tensor(sources, dtype=torch.int64),
            placements=torch.from_numpy(np.stack([_draw_placement(generator) for generator in generators])),
            pasted=torch.tensor(pasted, dtype=torch.int64),
            receivers=torch.tensor(receivers, dtype=torch.int64),
        )

    def _draw_view(self, opened: Opened, generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
        side = 1.0
        if generator.random() < self.crop_rate:
            side = math.sqrt(generator.uniform(_LEAST_AREA, 1.0))
        top, left = (generator.uniform(0.0, max(0.0, length - side)) for length in opened.extent)
        turn = -1.0 if generator.random() < 0.5 else 1.0
        return np.array([[turn * side, 0.0, 2 * left + side - 1], [0.0, side, 2 * top + side - 1]], np.float32)

    def _choose_pasted(
        self, opened: Sequence[Opened], place: int, generator: np.random.Generator
    ) -> tuple[int, Int[np.ndarray, "n"]]:
        """Another picture of the batch, and places of some of its objects; with `pastes_alike` of shared clusters."""
        own = frozenset(opened[place].objects.clusters.tolist())
        others = [each for each in range(len(opened)) if each != place]
        fitting = {each: list_fitting(opened[each].objects, own if self.pastes_alike else None) for each in others}
        others = [each for each in others if len(fitting[each])]
        if not others:
            return place, np.zeros(0, np.int64)
        source = others[int(generator.integers(len(others)))]
        return source, generator.permutation(fitting[source])[: generator.integers(1, MOST_PASTED + 1)]


def _draw_placement(generator: np.random.Generator) -> Float32[np.ndarray, "2 3"]:
    """Another picture made smaller, anywhere in the square."""
    ratio = generator.uniform(_LEAST_RATIO, 1.0)
    top, left = generator.uniform(0.0, 1.0 - ratio, 2)
    across, down = ((1.0 - 2.0 * each - ratio) / ratio for each in (left, top))
    return np.array([[1.0 / ratio, 0.0, across], [0.0, 1.0 / ratio, down]], np.float32)


def _stack(opened: Sequence[Opened]) -> Pictures:
    counts = [len(each.objects) for each in opened]
    return Pictures(
        pixels=torch.from_numpy(np.stack([each.square for each in opened])),
        semantic=torch.from_numpy(np.stack([each.semantic for each in opened]).astype(np.int64)),
        masks=torch.from_numpy(np.concatenate([each.objects.masks for each in opened])),
        owners=torch.from_numpy(np.repeat(np.arange(len(opened)), counts)),
        clusters=torch.from_numpy(np.concatenate([each.objects.clusters for each in opened]) - 1),
        weights=torch.from_numpy(np.concatenate([each.objects.weights for each in opened])),
    )
