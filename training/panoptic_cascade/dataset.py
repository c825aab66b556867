"""Training samples of a panoptic cascade: photos of any size with whole masks, copy-paste, and padding to a batch."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pycocotools import mask as coco
from torch import Tensor
from torch.nn import functional

from model.images import read_image, resize_image, resize_labels
from model.networks.boxes import masks_to_boxes
from training.data.dataset import LabeledPhoto, read_label_map
from training.panoptic_cascade.config import CascadeTrainConfig, CopyPaste
from training.trainer.task import IGNORE_INDEX, PhotoSampler, TrainingBatch, make_semantic_map

_LOADER_THREADS = 8
_MAX_COVERED = 0.5
"""Fraction of an instance that a pasted one may cover."""


@dataclass(frozen=True, kw_only=True)
class CascadeSample:
    """One photo with its labels."""

    pixels: UInt8[Tensor, "3 H W"]
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """0-based."""
    semantic: Int[Tensor, "H W"]
    """0 for things, s for stuff cluster s, else IGNORE_INDEX."""

    @cached_property
    def boxes(self) -> Float[Tensor, "M 4"]:
        """Boxes of the masks, in pixels."""
        return masks_to_boxes(self.masks[None])[0]

    def hflip(self) -> "CascadeSample":
        """Mirror left and right."""
        pixels, masks, semantic = (each.flip(-1) for each in (self.pixels, self.masks, self.semantic))
        return replace(self, pixels=pixels, masks=masks, semantic=semantic)


@dataclass(frozen=True, kw_only=True)
class CascadeBatch(TrainingBatch):
    """Resized and mirrored photos, before copy-paste and padding."""

    samples: tuple[CascadeSample, ...]


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Samples padded to one size."""

    pixels: UInt8[Tensor, "B 3 H W"]
    """Zeros outside the photos."""
    sizes: Int[Tensor, "B 2"]
    """Height and width of each photo."""
    targets: tuple[CascadeSample, ...]


@dataclass(frozen=True, kw_only=True)
class CascadeDataset:
    """Samples of a label dataset."""

    sampler: PhotoSampler
    instances: Mapping[str, Sequence[Mapping[str, Any]]]
    """COCO annotations by photo, as `PseudoLabelDataset.read_instances` returns them."""
    thing_clusters: int
    config: CascadeTrainConfig

    def load_batch(self, first: int, count: int) -> CascadeBatch:
        """Load samples `first` to `first + count`."""
        photos, generators = self.sampler.sample(first, count)
        with ThreadPoolExecutor(_LOADER_THREADS) as threads:
            samples = tuple(threads.map(self._load_sample, photos, generators))
        return CascadeBatch(samples=samples, photos=tuple(photo.path for photo in photos))

    def _load_sample(self, photo: LabeledPhoto, generator: np.random.Generator) -> CascadeSample:
        """Load a photo at one of the configured sizes, mirrored with a probability of one half."""
        is_mirrored = generator.random() < 0.5
        image = read_image(photo.path).image
        short_px = int(generator.choice(self.config.min_sizes))
        scale = min(short_px / min(image.shape[:2]), self.config.max_size / max(image.shape[:2]))
        height, width = (max(1, round(length * scale)) for length in image.shape[:2])
        label_map = resize_labels(read_label_map(photo.label), height, width)
        semantic = make_semantic_map(photo, label_map, self.thing_clusters)
        annotations = self.instances[photo.digest]
        masks = np.zeros((len(annotations), height, width), bool)
        for mask, entry in zip(masks, annotations, strict=True):
            mask[:] = resize_labels(coco.decode(entry["segmentation"]).astype(np.int32), height, width) > 0
        is_visible = torch.from_numpy(masks.any((1, 2)))
        clusters = [0 if self.config.cls_agnostic else entry["category_id"] - 1 for entry in annotations]
        sample = CascadeSample(
            pixels=torch.from_numpy(resize_image(image, height, width)).permute(2, 0, 1).contiguous(),
            masks=torch.from_numpy(masks)[is_visible],
            clusters=torch.tensor(clusters, dtype=torch.int64)[is_visible],
            semantic=torch.from_numpy(semantic.astype(np.int64)),
        )
        return sample.hflip() if is_mirrored else sample


def copy_paste_batch(
    samples: tuple[CascadeSample, ...], copy_paste: CopyPaste, min_ratio: float, generator: np.random.Generator
) -> tuple[CascadeSample, ...]:
    """Paste instances of another sample of the batch into each.

    `any`: sample i receives from sample B - 1 - i (CutLER's copy-paste). `same-class`: from a sample with a common
    cluster, and only instances of common clusters (U2Seg, equation 4).
    """
    if copy_paste == "none":
        return samples
    pasted = []
    for index, sample in enumerate(samples):
        source = samples[-1 - index]
        if copy_paste == "same-class":
            source = _sample_same_class(sample, samples, generator)
        pasted.append(copy_paste_pair(sample, source, min_ratio, generator))
    return tuple(pasted)


def _sample_same_class(
    sample: CascadeSample, samples: tuple[CascadeSample, ...], generator: np.random.Generator
) -> CascadeSample:
    """Sample another photo with a common cluster and keep its instances of such; without one, return no instances."""
    candidates = []
    for other in samples:
        is_common = torch.isin(other.clusters, sample.clusters)
        if other is not sample and is_common.any():
            candidates.append(replace(other, masks=other.masks[is_common], clusters=other.clusters[is_common]))
    if not candidates:
        return replace(sample, masks=sample.masks[:0])
    return candidates[int(generator.integers(len(candidates)))]


def copy_paste_pair(
    sample: CascadeSample, source: CascadeSample, min_ratio: float, generator: np.random.Generator
) -> CascadeSample:
    """Paste some instances of another sample at a random scale and position.

    CutLER's copy-paste (cutler/data/detection_utils.py and engine/train_loop.py): at most all but one of the
    instances, the whole source resized to a fraction of the sample's size, one shift for all. As there, an instance
    that would cover half of an existing one is left out. Unlike there, boxes are shifted as masks are.
    """
    count = len(source.masks)
    if not count:
        return sample
    kept = 1 if count == 1 else int(generator.integers(1, count))
    chosen = torch.from_numpy(generator.permutation(count)[:kept]).to(source.masks.device)
    ratio, (height, width) = generator.uniform(min_ratio, 1.0), sample.masks.shape[1:]
    size = (max(1, round(ratio * height)), max(1, round(ratio * width)))
    top, left = (int(generator.integers(whole - part + 1)) for whole, part in zip((height, width), size, strict=True))
    window = slice(top, top + size[0]), slice(left, left + size[1])
    pixels, masks = torch.zeros_like(sample.pixels), sample.masks.new_zeros(kept, height, width)
    resized = functional.interpolate(
        source.pixels[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    pixels[:, *window] = resized.round().clamp(0, 255).to(torch.uint8)
    small = functional.interpolate(source.masks[chosen][None].to(torch.uint8), size=size, mode="nearest-exact")
    masks[:, *window] = small[0].bool()
    return _overlay(sample, pixels, masks, source.clusters[chosen])


def _overlay(
    sample: CascadeSample, pixels: UInt8[Tensor, "3 H W"], masks: Bool[Tensor, "N H W"], clusters: Int[Tensor, "N"]
) -> CascadeSample:
    """Draw masked parts of other pixels over the sample; instances that are hidden completely are removed."""
    pasted_masks, own = masks.flatten(1).float(), sample.masks.flatten(1).float()
    with torch.autocast(pasted_masks.device.type, enabled=False):
        covered = pasted_masks @ own.T / own.sum(1).clamp(min=1.0)  # N M
    is_kept = (covered < _MAX_COVERED).all(1) & (pasted_masks.sum(1) > 0)
    masks, clusters = masks[is_kept], clusters[is_kept]
    pasted = masks.any(0)
    remaining = torch.cat([sample.masks & ~pasted, masks])
    is_visible = remaining.flatten(1).any(1)
    return replace(
        sample,
        pixels=torch.where(pasted, pixels, sample.pixels),
        masks=remaining[is_visible],
        clusters=torch.cat([sample.clusters, clusters])[is_visible],
        semantic=torch.where(pasted, 0, sample.semantic),
    )


def pad_to_batch(samples: tuple[CascadeSample, ...], multiple_px: int) -> PaddedBatch:
    """Pad all samples to the largest height and width, rounded up to a multiple."""
    sizes = torch.tensor([each.semantic.shape for each in samples])
    height, width = (-(-int(length) // multiple_px) * multiple_px for length in sizes.amax(0))
    padded = []
    for each in samples:
        edges = (0, width - each.semantic.shape[1], 0, height - each.semantic.shape[0])
        pixels, masks = functional.pad(each.pixels, edges), functional.pad(each.masks, edges)
        semantic = functional.pad(each.semantic, edges, value=IGNORE_INDEX)
        padded.append(replace(each, pixels=pixels, masks=masks, semantic=semantic))
    pixels = torch.stack([each.pixels for each in padded])
    return PaddedBatch(pixels=pixels, sizes=sizes.to(pixels.device), targets=tuple(padded))
