"""Labelled photos as a cascade is taught by them, the n-th sample of a fit always being the same."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from pycocotools import mask as coco
from torch import Tensor
from torch.nn import functional

from model.contract import InputSize
from model.images import letterbox_image, plan_letterbox, read_image, resize_labels
from model.networks.boxes import masks_to_boxes
from model.networks.fpn import PATCH_STRIDE_PX
from training.data.dataset import LabeledPhoto, read_label_map
from training.data.features import FeatureCache
from training.panoptic_cascade.config import CascadeTrainConfig, CopyPaste
from training.panoptic_cascade.matching import CascadeTarget
from training.trainer.task import IGNORE_INDEX

_READERS = 8
"""Threads; photos are decoded outside Python's lock."""


@dataclass(frozen=True, kw_only=True)
class CascadeSample:
    """One photo with its labels; `inputs` are its pixels, or what an encoder made of cells of them."""

    inputs: Tensor
    """uint8 3 H W, or floating C H/cell W/cell."""
    cell_px: int
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """Counted from 0."""
    semantic: Int[Tensor, "H W"]
    """0 things, s stuff cluster s, IGNORE elsewhere."""


@dataclass(frozen=True, kw_only=True)
class CascadeBatch:
    """Photos of any sizes, resized and mirrored, before any is pasted into another."""

    examples: tuple[CascadeSample, ...]
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class CascadeDataset:
    """An endless, seeded walk over the photos: a new order each epoch, half of them mirrored."""

    photos: Sequence[LabeledPhoto]
    masks: Mapping[str, Sequence[Mapping[str, Any]]]
    """Whole masks by photo, as `PseudoLabelDataset.read_instances` gives them."""
    cache: FeatureCache
    thing_clusters: int
    recipe: CascadeTrainConfig

    def read(self, first: int, count: int) -> CascadeBatch:
        """Samples `first` to `first + count` of the walk."""
        walk = [self._choose(index) for index in range(first, first + count)]
        with ThreadPoolExecutor(_READERS) as readers:
            examples = tuple(readers.map(self._read, *zip(*walk, strict=True)))
        return CascadeBatch(examples=examples, photos=tuple(photo.path for photo, _ in walk))

    def _choose(self, index: int) -> tuple[LabeledPhoto, np.random.Generator]:
        epoch, place_in_epoch = divmod(index, len(self.photos))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.photos))
        return self.photos[order[place_in_epoch]], np.random.default_rng((self.recipe.seed, epoch, place_in_epoch))

    def _read(self, photo: LabeledPhoto, generator: np.random.Generator) -> CascadeSample:
        is_mirrored = generator.random() < 0.5
        is_cached = self.recipe.inputs == "features"
        example = self._read_features(photo) if is_cached else self._read_pixels(photo, generator)
        return hflip_sample(example) if is_mirrored else example

    def _read_pixels(self, photo: LabeledPhoto, generator: np.random.Generator) -> CascadeSample:
        """The photo at one of the recipe's sizes."""
        image = read_image(photo.path).image
        short_px = int(generator.choice(self.recipe.short_sides_px))
        canvas = plan_size(image.shape[0], image.shape[1], short_px, self.recipe.longest_side_px)
        pixels, placement = letterbox_image(image, [canvas], 1)
        pixels = pixels[:, : placement.resized_height, : placement.resized_width]
        return self._label(photo, torch.from_numpy(pixels.copy()), 1, placement.size, placement.size)

    def _read_features(self, photo: LabeledPhoto) -> CascadeSample:
        """What the encoder's last block made of the photo on its square, which is a canvas of so many patches."""
        last = np.asarray(self.cache.read(photo.digest)[-1], dtype=np.float32)
        maps = torch.from_numpy(last).permute(2, 0, 1)  # C g g
        side = maps.shape[1] * PATCH_STRIDE_PX
        height, width = read_label_map(photo.label).shape
        size = plan_letterbox(height, width, [InputSize.square(side)], 1).size
        return self._label(photo, maps, PATCH_STRIDE_PX, size, (side, side))

    def _label(
        self, photo: LabeledPhoto, inputs: Tensor, cell_px: int, size: tuple[int, int], input_size: tuple[int, int]
    ) -> CascadeSample:
        """The labels at the photo's size on a canvas."""
        semantic = np.full(input_size, IGNORE_INDEX, np.int64)
        semantic[: size[0], : size[1]] = self._map_semantic(photo, size)
        entries = self.masks[photo.digest]
        masks = np.zeros((len(entries), *input_size), bool)
        for mask, entry in zip(masks, entries, strict=True):
            mask[: size[0], : size[1]] = resize_labels(coco.decode(entry["segmentation"]).astype(np.int32), *size) > 0
        is_seen = torch.from_numpy(masks.any((1, 2)))
        numbers = [0 if self.recipe.is_agnostic else entry["category_id"] - 1 for entry in entries]
        return CascadeSample(
            inputs=inputs,
            cell_px=cell_px,
            masks=torch.from_numpy(masks)[is_seen],
            clusters=torch.tensor(numbers, dtype=torch.int64)[is_seen],
            semantic=torch.from_numpy(semantic),
        )

    def _map_semantic(self, photo: LabeledPhoto, size: tuple[int, int]) -> Int64[np.ndarray, "h w"]:
        labels = resize_labels(read_label_map(photo.label), *size)
        semantic = np.full(labels.shape, IGNORE_INDEX, np.int64)
        for segment, category in photo.categories.items():
            semantic[labels == segment] = max(0, category - self.thing_clusters)
        return semantic


def plan_size(height: int, width: int, short_px: int, longest_px: int) -> InputSize:
    """The size of a photo whose shorter side has that length, or whose longer one has the longest allowed."""
    scale = min(short_px / min(height, width), longest_px / max(height, width))
    return InputSize(height_px=max(1, round(height * scale)), width_px=max(1, round(width * scale)))


_MOST_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """A batch on one canvas."""

    inputs: Tensor
    """B C h w, zeros where there is no photo."""
    sizes: Int[Tensor, "B 2"]
    objects: tuple[CascadeTarget, ...]


def hflip_sample(example: CascadeSample) -> CascadeSample:
    """Left and right exchanged."""
    inputs, masks, semantic = (each.flip(-1) for each in (example.inputs, example.masks, example.semantic))
    return replace(example, inputs=inputs, masks=masks, semantic=semantic)


def copy_paste_batch(
    examples: tuple[CascadeSample, ...], pasting: CopyPaste, least_ratio: float, generator: np.random.Generator
) -> tuple[CascadeSample, ...]:
    """Each example with objects of another one of the batch.

    `any`: of the one as far from the end as it is from the beginning (CutLER's copy-paste). `semantic`: of one that
    has a cluster in common, and objects of such clusters alone (U2Seg, equation 4).
    """
    pasted = []
    for place, example in enumerate(examples):
        source = examples[-1 - place]
        if pasting == "semantic":
            source = _choose_kin(example, examples, generator)
        pasted.append(example if pasting == "none" else copy_paste_pair(example, source, least_ratio, generator))
    return tuple(pasted)


def _choose_kin(
    example: CascadeSample, examples: tuple[CascadeSample, ...], generator: np.random.Generator
) -> CascadeSample:
    """Another example with some of the same clusters, and only its objects of those; without objects if none has."""
    kin = []
    for other in examples:
        is_common = torch.isin(other.clusters, example.clusters)
        if other is not example and is_common.any():
            kin.append(replace(other, masks=other.masks[is_common], clusters=other.clusters[is_common]))
    return kin[int(generator.integers(len(kin)))] if kin else replace(example, masks=example.masks[:0])


def copy_paste_pair(
    example: CascadeSample, source: CascadeSample, least_ratio: float, generator: np.random.Generator
) -> CascadeSample:
    """The example with some of the source's objects, at a random size and place.

    CutLER's copy-paste (cutler/data/detection_utils.py and engine/train_loop.py): all but one of the objects at most,
    the whole source squeezed to a share of the example's size, one shift for all. As there, an object that would
    cover half of one that is there is left out. Unlike there, boxes are shifted as masks are, and where `inputs` are
    features sizes and shifts are whole cells.
    """
    count = len(source.masks)
    if not count:
        return example
    kept = 1 if count == 1 else int(generator.integers(1, count))
    chosen = torch.from_numpy(generator.permutation(count)[:kept]).to(source.masks.device)
    ratio, cell = generator.uniform(least_ratio, 1.0), example.cell_px
    rows, columns = (max(1, round(ratio * length / cell)) for length in example.masks.shape[1:])
    top, left = (
        int(generator.integers(length // cell - cells + 1))
        for length, cells in zip(example.masks.shape[1:], (rows, columns), strict=True)
    )
    frame = (slice(None), slice(top, top + rows), slice(left, left + columns))
    inputs, masks = torch.zeros_like(example.inputs), example.masks.new_zeros(kept, *example.masks.shape[1:])
    inputs[frame] = _resize(source.inputs, rows, columns)
    wide = tuple(slice(each.start * cell, each.stop * cell) for each in frame[1:])
    small = functional.interpolate(
        source.masks[chosen][None].to(torch.uint8), size=(rows * cell, columns * cell), mode="nearest-exact"
    )
    masks[(slice(None), *wide)] = small[0].bool()
    return _lay_over(example, inputs, masks, source.clusters[chosen])


def _resize(inputs: Tensor, rows: int, columns: int) -> Tensor:
    resized = functional.interpolate(
        inputs[None].float(), size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if inputs.dtype == torch.uint8 else resized.to(inputs.dtype)


def _lay_over(
    example: CascadeSample, inputs: Tensor, masks: Bool[Tensor, "N H W"], clusters: Int[Tensor, "N"]
) -> CascadeSample:
    """The example with what `masks` show of other inputs; its own masks lose that, and vanish if nothing is left."""
    flat, own = masks.flatten(1).float(), example.masks.flatten(1).float()
    with torch.autocast(flat.device.type, enabled=False):
        covered = flat @ own.T / own.sum(1).clamp(min=1.0)  # N M
    is_kept = (covered < _MOST_OVERLAP).all(1) & (flat.sum(1) > 0)
    masks, clusters = masks[is_kept], clusters[is_kept]
    pasted = masks.any(0)
    remaining = torch.cat([example.masks & ~pasted, masks])
    is_seen = remaining.flatten(1).any(1)
    share = functional.avg_pool2d(pasted[None].float(), example.cell_px)[0]
    return replace(
        example,
        inputs=torch.where(share >= 0.5, inputs, example.inputs),
        masks=remaining[is_seen],
        clusters=torch.cat([example.clusters, clusters])[is_seen],
        semantic=torch.where(pasted, 0, example.semantic),
    )


def pad_to_batch(examples: tuple[CascadeSample, ...], multiple_px: int) -> PaddedBatch:
    """All on a canvas as large as the largest, its sides rounded up."""
    height, width = (
        -(-max(each.masks.shape[axis] for each in examples) // multiple_px) * multiple_px for axis in (1, 2)
    )
    inputs, objects = [], []
    for each in examples:
        below, right = height - each.masks.shape[1], width - each.masks.shape[2]
        inputs.append(functional.pad(each.inputs, (0, right // each.cell_px, 0, below // each.cell_px)))
        masks = functional.pad(each.masks, (0, right, 0, below))
        semantic = functional.pad(each.semantic, (0, right, 0, below), value=IGNORE_INDEX)
        boxes = masks_to_boxes(masks[None])[0]
        objects.append(CascadeTarget(boxes=boxes, masks=masks, clusters=each.clusters, semantic=semantic))
    sizes = torch.tensor([each.masks.shape[1:] for each in examples], device=examples[0].inputs.device)
    return PaddedBatch(inputs=torch.stack(inputs), sizes=sizes, objects=tuple(objects))
