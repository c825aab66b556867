"""Training targets: the instances and the semantic map of a labeled photo, as seen in a crop."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16, Int32
from pycocotools import mask as coco
from torch import Tensor
from torch.nn import functional

from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map
from training.mask_transformer.crops import CropView
from training.trainer.task import IGNORE_INDEX

VOID, PADDING = -1, -2
"""Values of a semantic map where a pixel has no label, and where there is no photo."""
_MIN_MASK_AREA = 4
"""Smaller instances, in map pixels, are no targets."""
_BAND_WIDTH = 5
"""Side of the window in which stuff next to things is ignored."""
MAX_PASTED = 3
"""Maximum number of instances that copy-paste adds to a sample."""
_MIN_PASTED_AREA, _MAX_PASTED_AREA = 0.01, 0.35
"""Fractions of the input: smaller instances cover hardly a patch, larger ones hide everything else."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Targets of one photo, at the mask stride."""

    masks: Float[Tensor, "M h w"]
    clusters: Int[Tensor, "M"]
    """0-based."""
    weights: Float[Tensor, "M"]
    """Loss weight of each mask, 0..1."""
    semantic: Int[Tensor, "h w"]
    """0 for things, s for stuff cluster s, else IGNORE_INDEX."""
    is_labeled: Bool[Tensor, "h w"]
    """Where an unmatched query is trained as no-object; elsewhere it may have found an unlabeled instance."""


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

    def occlude(self, cover: Bool[np.ndarray, "h w"]) -> "Instances":
        """Remove the covered pixels from all masks."""
        return replace(self, masks=self.masks & ~cover)

    def concat(self, others: "Instances") -> "Instances":
        return Instances(
            masks=np.concatenate([self.masks, others.masks]),
            clusters=np.concatenate([self.clusters, others.clusters]),
            weights=np.concatenate([self.weights, others.weights]),
        )

    def find_pasteable(self, clusters: frozenset[int] | None) -> Int[np.ndarray, "n"]:
        """Return the indices of instances of a suitable area and at least median weight, of these clusters if given."""
        areas = self.masks.mean((1, 2))
        is_pasteable = (areas >= _MIN_PASTED_AREA) & (areas <= _MAX_PASTED_AREA)
        if len(self):
            is_pasteable &= self.weights >= np.median(self.weights)
        if clusters is not None:
            is_pasteable &= np.isin(self.clusters, list(clusters))
        return np.flatnonzero(is_pasteable)


@dataclass(frozen=True)
class InstanceMasks:
    """The best instance masks of each photo of a dataset, including what other instances hide."""

    entries: Mapping[str, tuple[dict[str, Any], ...]]
    """COCO run lengths, cluster and weight of each mask, by the photo's hash."""

    @classmethod
    def load(cls, dataset: PseudoLabelDataset, max_per_photo: int) -> Self:
        """Load the masks with the best scores. The score, at most 1, is the weight; without a score it is 1."""
        kept = {}
        for digest, masks in dataset.read_instances().items():
            scored = [(min(1.0, each.get("score", 1.0)), each) for each in masks if each.get("score", 1.0) > 0.0]
            scored.sort(key=lambda pair: -float(pair[1].get("score", 1.0)))
            kept[digest] = tuple(
                {"rle": each["segmentation"], "cluster": each["category_id"], "weight": weight}
                for weight, each in scored[:max_per_photo]
            )
        return cls(kept)

    def clusters(self, digest: str) -> frozenset[int]:
        """Return the clusters of a photo's masks."""
        return frozenset(int(each["cluster"]) for each in self.entries[digest])

    def crop(self, digest: str, view: CropView) -> Instances:
        """Return a photo's instances in a view, best first; masks outside the view are empty."""
        entries = self.entries[digest]
        masks = np.zeros((len(entries), view.map_side, view.map_side), bool)
        if entries:
            # H W N -> N h w
            decoded = coco.decode([each["rle"] for each in entries])
            masks[:] = view.crop_labels(decoded, 0).transpose(2, 0, 1)
        return Instances(
            masks=masks,
            clusters=np.array([each["cluster"] for each in entries], np.int64),
            weights=np.array([each["weight"] for each in entries], np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """Reads the labels of photos."""

    thing_clusters: int
    instance_masks: InstanceMasks | None
    """None: the instances are the segments of the panoptic maps."""

    def read(self, photo: LabeledPhoto, view: CropView) -> tuple[Int16[np.ndarray, "h w"], Instances]:
        """Return the semantic map and the instances of a photo in a view.

        The map holds 0 for things, s for stuff cluster s, VOID or PADDING.
        """
        label_map = view.crop_labels(read_label_map(photo.label), -1)
        semantic = make_semantic_map(label_map, photo.categories, self.thing_clusters)
        if self.instance_masks:
            return semantic, self.instance_masks.crop(photo.digest, view)
        return semantic, instances_from_panoptic(label_map, photo.categories, self.thing_clusters)

    def clusters(self, photo: LabeledPhoto) -> frozenset[int]:
        """Return the thing clusters of a photo."""
        if self.instance_masks:
            return self.instance_masks.clusters(photo.digest)
        return frozenset(each for each in photo.categories.values() if each <= self.thing_clusters)


def make_semantic_map(
    label_map: Int32[np.ndarray, "h w"], categories: Mapping[int, int], thing_clusters: int
) -> Int16[np.ndarray, "h w"]:
    """Convert a panoptic map, -1 where there is no photo, to a semantic map."""
    semantic = np.where(label_map < 0, np.int16(PADDING), np.int16(VOID))
    for segment, category in categories.items():
        semantic[label_map == segment] = max(0, category - thing_clusters)
    return semantic


def instances_from_panoptic(
    label_map: Int32[np.ndarray, "h w"], categories: Mapping[int, int], thing_clusters: int
) -> Instances:
    """Return the things of a panoptic map, all of weight 1."""
    things = [segment for segment, category in categories.items() if category <= thing_clusters]
    masks = np.array([label_map == segment for segment in things], bool).reshape(len(things), *label_map.shape)
    clusters = np.array([categories[segment] for segment in things], np.int64)
    return Instances(masks=masks, clusters=clusters, weights=np.ones(len(things), np.float32))


def to_targets(
    semantic: Int[Tensor, "B h w"],
    masks: Bool[Tensor, "P h w"],
    image_indices: Int[Tensor, "P"],
    clusters: Int[Tensor, "P"],
    weights: Float[Tensor, "P"],
    *,
    droploss: bool,
) -> tuple[Target, ...]:
    """Convert the labels of a batch to targets, without tiny instances; those of one image follow each other.

    Void, padding and a band of stuff around things are ignored: patches next to an instance have features like its
    own, and stuff labels there are unreliable. With `droploss`, only stuff, instances and padding count as labeled.
    """
    is_kept = masks.flatten(1).sum(1) >= _MIN_MASK_AREA
    masks, image_indices, clusters, weights = (each[is_kept] for each in (masks, image_indices, clusters, weights))
    is_thing = semantic == 0
    near_thing = functional.max_pool2d(is_thing[:, None].float(), _BAND_WIDTH, 1, _BAND_WIDTH // 2)[:, 0] > 0
    classes = semantic.masked_fill((semantic < 0) | (near_thing & ~is_thing), IGNORE_INDEX)
    is_labeled = torch.ones_like(is_thing)
    if droploss:
        is_labeled = (semantic > 0) | (semantic == PADDING) | union_by_image(masks, image_indices, len(is_thing))
    counts = image_indices.bincount(minlength=len(is_thing)).tolist()
    per_image = zip(*(each.split(counts) for each in (masks, clusters, weights)), classes, is_labeled, strict=True)
    return tuple(
        Target(masks=mask.float(), clusters=cluster, weights=weight, semantic=labels, is_labeled=labeled)
        for mask, cluster, weight, labels, labeled in per_image
    )


def union_by_image(masks: Bool[Tensor, "P h w"], image_indices: Int[Tensor, "P"], count: int) -> Bool[Tensor, "B h w"]:
    """Return the union of the masks of each image."""
    summed = torch.zeros(count, *masks.shape[1:], device=masks.device)
    return summed.index_add_(0, image_indices, masks.float()) > 0
