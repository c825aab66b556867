"""Training samples of the mask transformer: pixels, semantic map and instances of photos, and targets of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8
from pycocotools import mask as coco
from torch import Tensor
from torch.nn import functional

from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map
from training.mask_transformer.crops import CropView
from training.trainer.task import IGNORE_INDEX, make_semantic_map

PADDING = -2
"""Value of a semantic map where there is no photo."""
_MIN_MASK_AREA = 4
"""Smaller instances, in map pixels, are no targets."""
_BAND_WIDTH = 5
"""Side of the window in which stuff next to things is ignored."""
MAX_PASTED = 3
"""Maximum number of instances that copy-paste adds to a sample."""
_MIN_PASTED_AREA, _MAX_PASTED_AREA = 0.01, 0.35
"""Fractions of the input: smaller instances cover hardly a patch, larger ones hide everything else."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Things of one sample; their masks may overlap."""

    masks: Bool[np.ndarray, "N h w"]
    clusters: Int[np.ndarray, "N"]
    """1-based."""
    weights: Float32[np.ndarray, "N"]
    """Loss weights, 0..1."""

    def __len__(self) -> int:
        return len(self.masks)

    def select(self, chosen: Int[np.ndarray, "M"] | Bool[np.ndarray, "N"]) -> "Instances":
        """Return the instances at these indices, or where a mask is set."""
        return Instances(masks=self.masks[chosen], clusters=self.clusters[chosen], weights=self.weights[chosen])

    def find_pasteable(self, clusters: frozenset[int] | None) -> Int[np.ndarray, "n"]:
        """Return the indices of instances of a suitable area and at least median weight, of these clusters if given."""
        areas = self.masks.mean((1, 2))
        is_pasteable = (areas >= _MIN_PASTED_AREA) & (areas <= _MAX_PASTED_AREA)
        if len(self):
            is_pasteable &= self.weights >= np.median(self.weights)
        if clusters is not None:
            is_pasteable &= np.isin(self.clusters, list(clusters))
        return np.flatnonzero(is_pasteable)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A photo, or a crop of it, with its labels. The sample owns its arrays."""

    pixels: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    """0 for things, s for stuff cluster s, IGNORE_INDEX or PADDING."""
    instances: Instances


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Samples of one size, and the instances of all of them."""

    pixels: UInt8[Tensor, "B 3 S S"]
    semantic: Int[Tensor, "B h w"]
    """0 for things, s for stuff cluster s, IGNORE_INDEX or PADDING."""
    masks: Bool[Tensor, "P h w"]
    image_indices: Int[Tensor, "P"]
    """Index of the sample that each instance belongs to, ascending."""
    clusters: Int[Tensor, "P"]
    """0-based."""
    weights: Float[Tensor, "P"]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of a batch, at the mask stride."""

    masks: Float[Tensor, "P h w"]
    image_indices: Int[Tensor, "P"]
    """Ascending."""
    clusters: Int[Tensor, "P"]
    """0-based."""
    weights: Float[Tensor, "P"]
    """Loss weight of each mask, 0..1."""
    semantic: Int[Tensor, "B h w"]
    """0 for things, s for stuff cluster s, else IGNORE_INDEX."""
    is_labeled: Bool[Tensor, "B h w"]
    """Where an unmatched query is trained as no-object; elsewhere it may have found an unlabeled instance."""


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """Reads the labels of photos."""

    thing_clusters: int
    annotations: Mapping[str, Sequence[Mapping[str, Any]]] | None
    """COCO annotations of the instances of each photo; None: they are the segments of the panoptic maps."""

    def read(self, photo: LabeledPhoto, view: CropView) -> tuple[Int16[np.ndarray, "h w"], Instances]:
        """Return the semantic map and the instances of a photo in a view; instances outside of it have empty masks.

        The weight of an annotation is its score, at most 1; without a score it is 1.
        """
        label_map = view.crop_labels(read_label_map(photo.label), PADDING)
        semantic = make_semantic_map(photo, label_map, self.thing_clusters)
        semantic[label_map == PADDING] = PADDING
        if self.annotations is None:
            things = [segment for segment, category in photo.categories.items() if category <= self.thing_clusters]
            clusters, weights = [photo.categories[segment] for segment in things], [1.0] * len(things)
            masks = [label_map == segment for segment in things]
        else:
            found = self.annotations[photo.digest]
            clusters = [each["category_id"] for each in found]
            weights = [min(1.0, each.get("score", 1.0)) for each in found]
            masks = []
            if found:
                decoded = coco.decode([each["segmentation"] for each in found])  # H W N
                masks = list(view.crop_labels(decoded, 0).transpose(2, 0, 1))
        return semantic, Instances(
            masks=np.array(masks, bool).reshape(-1, *label_map.shape),
            clusters=np.array(clusters, np.int64),
            weights=np.array(weights, np.float32),
        )

    def clusters(self, photo: LabeledPhoto) -> frozenset[int]:
        """Return the thing clusters of a photo."""
        if self.annotations is None:
            return frozenset(each for each in photo.categories.values() if each <= self.thing_clusters)
        return frozenset(each["category_id"] for each in self.annotations[photo.digest])


def select_instances(dataset: PseudoLabelDataset, max_per_photo: int) -> dict[str, list[dict[str, Any]]]:
    """Return the annotations with the best scores of each photo, best first."""
    selected = {}
    for digest, annotations in dataset.read_instances().items():
        scored = [each for each in annotations if each.get("score", 1.0) > 0.0]
        selected[digest] = sorted(scored, key=lambda each: -float(each.get("score", 1.0)))[:max_per_photo]
    return selected


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Put samples of one size together."""
    instances = [each.instances for each in samples]
    return ImageBatch(
        pixels=torch.from_numpy(np.stack([each.pixels for each in samples])),
        semantic=torch.from_numpy(np.stack([each.semantic for each in samples]).astype(np.int64)),
        masks=torch.from_numpy(np.concatenate([each.masks for each in instances])),
        image_indices=torch.from_numpy(np.repeat(np.arange(len(samples)), [len(each) for each in instances])),
        clusters=torch.from_numpy(np.concatenate([each.clusters for each in instances]) - 1),
        weights=torch.from_numpy(np.concatenate([each.weights for each in instances])),
    )


def make_targets(images: ImageBatch, *, droploss: bool) -> Targets:
    """Convert the labels of a batch to targets, without tiny instances.

    Void, padding and a band of stuff around things are ignored: patches next to an instance have features like its
    own, and stuff labels there are unreliable. With `droploss`, only stuff, instances and padding count as labeled.
    """
    is_kept = images.masks.flatten(1).sum(1) >= _MIN_MASK_AREA
    masks, image_indices = images.masks[is_kept], images.image_indices[is_kept]
    semantic, is_thing = images.semantic, images.semantic == 0
    near_thing = functional.max_pool2d(is_thing[:, None].float(), _BAND_WIDTH, 1, _BAND_WIDTH // 2)[:, 0] > 0
    is_labeled = torch.ones_like(is_thing)
    if droploss:
        is_labeled = (semantic > 0) | (semantic == PADDING) | union_by_image(masks, image_indices, len(is_thing))
    return Targets(
        masks=masks.float(),
        image_indices=image_indices,
        clusters=images.clusters[is_kept],
        weights=images.weights[is_kept],
        semantic=semantic.masked_fill((semantic < 0) | (near_thing & ~is_thing), IGNORE_INDEX),
        is_labeled=is_labeled,
    )


def union_by_image(masks: Bool[Tensor, "P h w"], image_indices: Int[Tensor, "P"], count: int) -> Bool[Tensor, "B h w"]:
    """Return the union of the masks of each image."""
    summed = torch.zeros(count, *masks.shape[1:], device=masks.device)
    return summed.index_add_(0, image_indices, masks.float()) > 0
