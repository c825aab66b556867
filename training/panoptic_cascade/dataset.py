"""Training samples of a panoptic cascade: photos of any size with whole masks, copy-paste, and padding to a batch."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
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
from training.trainer.task import IGNORE_INDEX, PhotoSampler

_LOADER_THREADS = 8
_MAX_COVERED = 0.5
"""Fraction of an instance that a pasted one may cover."""


@dataclass(frozen=True, kw_only=True)
class CascadeSample:
    """One photo with its labels."""

    inputs: Tensor
    """Pixels, uint8 3 H W, or features, floating point C H/stride W/stride."""
    stride_px: int
    """Pixels per input element: 1 for pixels."""
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """0-based."""
    semantic: Int[Tensor, "H W"]
    """0 for things, s for stuff cluster s, else IGNORE_INDEX."""

    def hflip(self) -> "CascadeSample":
        """Mirror left and right."""
        inputs, masks, semantic = (each.flip(-1) for each in (self.inputs, self.masks, self.semantic))
        return replace(self, inputs=inputs, masks=masks, semantic=semantic)


@dataclass(frozen=True, kw_only=True)
class CascadeBatch:
    """Resized and mirrored photos, before copy-paste and padding."""

    samples: tuple[CascadeSample, ...]
    photos: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Samples padded to one size."""

    inputs: Tensor
    """B C h w; zeros outside the photos."""
    sizes: Int[Tensor, "B 2"]
    """Height and width of each photo."""
    targets: tuple[CascadeTarget, ...]


@dataclass(frozen=True, kw_only=True)
class CascadeDataset:
    """Samples of a label dataset, from pixels or cached features."""

    sampler: PhotoSampler
    instances: Mapping[str, Sequence[Mapping[str, Any]]]
    """COCO annotations by photo, as `PseudoLabelDataset.read_instances` returns them."""
    cache: FeatureCache
    thing_clusters: int
    config: CascadeTrainConfig

    def load_batch(self, first: int, count: int) -> CascadeBatch:
        """Load samples `first` to `first + count`."""
        sampled = [self.sampler[index] for index in range(first, first + count)]
        with ThreadPoolExecutor(_LOADER_THREADS) as threads:
            samples = tuple(threads.map(self._load_sample, *zip(*sampled, strict=True)))
        return CascadeBatch(samples=samples, photos=tuple(photo.path for photo, _ in sampled))

    def _load_sample(self, photo: LabeledPhoto, generator: np.random.Generator) -> CascadeSample:
        is_mirrored = generator.random() < 0.5
        from_cache = self.config.inputs == "features"
        sample = self._load_features(photo) if from_cache else self._load_pixels(photo, generator)
        return sample.hflip() if is_mirrored else sample

    def _load_pixels(self, photo: LabeledPhoto, generator: np.random.Generator) -> CascadeSample:
        """Load a photo at one of the configured sizes."""
        image = read_image(photo.path).image
        short_px = int(generator.choice(self.config.min_sizes))
        input_size = plan_size(image.shape[0], image.shape[1], short_px, self.config.max_size)
        pixels, letterbox = letterbox_image(image, [input_size], 1)
        pixels = pixels[:, : letterbox.resized_height, : letterbox.resized_width]
        return self._add_labels(photo, torch.from_numpy(pixels.copy()), 1, letterbox.size, letterbox.size)

    def _load_features(self, photo: LabeledPhoto) -> CascadeSample:
        """Load the output of the encoder's last block for the whole photo."""
        last = np.asarray(self.cache.read(photo.digest)[-1], dtype=np.float32)
        features = torch.from_numpy(last).permute(2, 0, 1)  # C g g
        side = features.shape[1] * PATCH_STRIDE_PX
        height, width = read_label_map(photo.label).shape
        size = plan_letterbox(height, width, [InputSize.square(side)], 1).size
        return self._add_labels(photo, features, PATCH_STRIDE_PX, size, (side, side))

    def _add_labels(
        self, photo: LabeledPhoto, inputs: Tensor, stride_px: int, size: tuple[int, int], padded: tuple[int, int]
    ) -> CascadeSample:
        """Resize the labels to the photo's size, and pad them."""
        semantic = np.full(padded, IGNORE_INDEX, np.int64)
        label_map = resize_labels(read_label_map(photo.label), *size)
        for segment, category in photo.categories.items():
            semantic[: size[0], : size[1]][label_map == segment] = max(0, category - self.thing_clusters)
        annotations = self.instances[photo.digest]
        masks = np.zeros((len(annotations), *padded), bool)
        for mask, entry in zip(masks, annotations, strict=True):
            mask[: size[0], : size[1]] = resize_labels(coco.decode(entry["segmentation"]).astype(np.int32), *size) > 0
        is_visible = torch.from_numpy(masks.any((1, 2)))
        clusters = [0 if self.config.cls_agnostic else entry["category_id"] - 1 for entry in annotations]
        return CascadeSample(
            inputs=inputs,
            stride_px=stride_px,
            masks=torch.from_numpy(masks)[is_visible],
            clusters=torch.tensor(clusters, dtype=torch.int64)[is_visible],
            semantic=torch.from_numpy(semantic),
        )


def plan_size(height: int, width: int, short_px: int, max_px: int) -> InputSize:
    """Return the size of a photo whose shorter side is resized to `short_px`, or whose longer side to `max_px`."""
    scale = min(short_px / min(height, width), max_px / max(height, width))
    return InputSize(height_px=max(1, round(height * scale)), width_px=max(1, round(width * scale)))


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
    that would cover half of an existing one is left out. Unlike there, boxes are shifted as masks are, and sizes and
    shifts of features are whole elements.
    """
    count = len(source.masks)
    if not count:
        return sample
    kept = 1 if count == 1 else int(generator.integers(1, count))
    chosen = torch.from_numpy(generator.permutation(count)[:kept]).to(source.masks.device)
    ratio, stride = generator.uniform(min_ratio, 1.0), sample.stride_px
    rows, columns = (max(1, round(ratio * length / stride)) for length in sample.masks.shape[1:])
    top, left = (
        int(generator.integers(length // stride - size + 1))
        for length, size in zip(sample.masks.shape[1:], (rows, columns), strict=True)
    )
    inputs, masks = torch.zeros_like(sample.inputs), sample.masks.new_zeros(kept, *sample.masks.shape[1:])
    inputs[:, top : top + rows, left : left + columns] = _resize(source.inputs, rows, columns)
    small = functional.interpolate(
        source.masks[chosen][None].to(torch.uint8), size=(rows * stride, columns * stride), mode="nearest-exact"
    )
    vertical, horizontal = (
        slice(first * stride, (first + size) * stride) for first, size in ((top, rows), (left, columns))
    )
    masks[:, vertical, horizontal] = small[0].bool()
    return _overlay(sample, inputs, masks, source.clusters[chosen])


def _resize(inputs: Tensor, rows: int, columns: int) -> Tensor:
    resized = functional.interpolate(
        inputs[None].float(), size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if inputs.dtype == torch.uint8 else resized.to(inputs.dtype)


def _overlay(
    sample: CascadeSample, inputs: Tensor, masks: Bool[Tensor, "N H W"], clusters: Int[Tensor, "N"]
) -> CascadeSample:
    """Draw masked parts of other inputs over the sample; instances that are hidden completely are removed."""
    pasted_masks, own = masks.flatten(1).float(), sample.masks.flatten(1).float()
    with torch.autocast(pasted_masks.device.type, enabled=False):
        covered = pasted_masks @ own.T / own.sum(1).clamp(min=1.0)  # N M
    is_kept = (covered < _MAX_COVERED).all(1) & (pasted_masks.sum(1) > 0)
    masks, clusters = masks[is_kept], clusters[is_kept]
    pasted = masks.any(0)
    remaining = torch.cat([sample.masks & ~pasted, masks])
    is_visible = remaining.flatten(1).any(1)
    fraction = functional.avg_pool2d(pasted[None].float(), sample.stride_px)[0]
    return replace(
        sample,
        inputs=torch.where(fraction >= 0.5, inputs, sample.inputs),
        masks=remaining[is_visible],
        clusters=torch.cat([sample.clusters, clusters])[is_visible],
        semantic=torch.where(pasted, 0, sample.semantic),
    )


def pad_to_batch(samples: tuple[CascadeSample, ...], multiple_px: int) -> PaddedBatch:
    """Pad all samples to the largest height and width, rounded up to a multiple."""
    height, width = (
        -(-max(each.masks.shape[axis] for each in samples) // multiple_px) * multiple_px for axis in (1, 2)
    )
    inputs, targets = [], []
    for each in samples:
        below, right = height - each.masks.shape[1], width - each.masks.shape[2]
        inputs.append(functional.pad(each.inputs, (0, right // each.stride_px, 0, below // each.stride_px)))
        masks = functional.pad(each.masks, (0, right, 0, below))
        semantic = functional.pad(each.semantic, (0, right, 0, below), value=IGNORE_INDEX)
        boxes = masks_to_boxes(masks[None])[0]
        targets.append(CascadeTarget(boxes=boxes, masks=masks, clusters=each.clusters, semantic=semantic))
    sizes = torch.tensor([each.masks.shape[1:] for each in samples], device=samples[0].inputs.device)
    return PaddedBatch(inputs=torch.stack(inputs), sizes=sizes, targets=tuple(targets))
