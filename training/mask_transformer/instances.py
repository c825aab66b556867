"""The objects of labelled photos, as masks that may overlap, each with a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32
from pycocotools import mask as coco

from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.crops import CropView


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Things of one square."""

    masks: Bool[np.ndarray, "N h w"]
    clusters: Int[np.ndarray, "N"]
    """Counted from 1."""
    weights: Float32[np.ndarray, "N"]
    """How much each counts in a loss, 0..1."""

    def __len__(self) -> int:
        return len(self.masks)

    def pick(self, chosen: Int[np.ndarray, "M"] | Bool[np.ndarray, "N"]) -> "Instances":
        """Some of them, by place or by a mask of places."""
        return Instances(masks=self.masks[chosen], clusters=self.clusters[chosen], weights=self.weights[chosen])

    def hide(self, cover: Bool[np.ndarray, "h w"]) -> "Instances":
        """The same behind something."""
        return Instances(masks=self.masks & ~cover, clusters=self.clusters, weights=self.weights)

    def join(self, others: "Instances") -> "Instances":
        return Instances(
            masks=np.concatenate([self.masks, others.masks]),
            clusters=np.concatenate([self.clusters, others.clusters]),
            weights=np.concatenate([self.weights, others.weights]),
        )


def instances_from_panoptic(
    labels: Int32[np.ndarray, "h w"], categories: Mapping[int, int], thing_clusters: int
) -> Instances:
    """The things of a panoptic map, all equally sure."""
    things = [each for each, category in categories.items() if category <= thing_clusters]
    masks = np.array([labels == each for each in things], bool).reshape(len(things), *labels.shape)
    clusters = np.array([categories[each] for each in things], np.int64)
    return Instances(masks=masks, clusters=clusters, weights=np.ones(len(things), np.float32))


@dataclass(frozen=True)
class InstanceMasks:
    """The best masks of each photo of a store, whole, as COCO's run lengths."""

    entries: Mapping[str, tuple[dict[str, Any], ...]]
    """By the photo's hash."""

    @classmethod
    def read(cls, store: PseudoLabelDataset, most: int) -> Self:
        """The `most` that score best in each photo; a score is a weight, one above 1 or none at all is 1."""
        kept = {}
        for digest, masks in store.read_instances().items():
            sure = sorted((each for each in masks if each.get("score", 1.0) > 0.0), key=_rank)
            kept[digest] = tuple(
                {
                    "rle": each["segmentation"],
                    "cluster": each["category_id"],
                    "weight": min(1.0, each.get("score", 1.0)),
                }
                for each in sure[:most]
            )
        return cls(kept)

    def list_clusters(self, digest: str) -> frozenset[int]:
        return frozenset(int(each["cluster"]) for each in self.entries[digest])

    def show(self, digest: str, frame: CropView) -> Instances:
        """Those of a photo in a frame, best first; some may have no cell there."""
        entries = self.entries[digest]
        masks = np.zeros((len(entries), frame.cells, frame.cells), bool)
        if entries:
            # H W N -> N h w
            decoded = coco.decode([each["rle"] for each in entries])
            masks[:] = frame.cut_cells(decoded, 0).transpose(2, 0, 1)
        return Instances(
            masks=masks,
            clusters=np.array([each["cluster"] for each in entries], np.int64),
            weights=np.array([each["weight"] for each in entries], np.float32),
        )


def _rank(mask: dict[str, Any]) -> float:
    return -float(mask.get("score", 1.0))
