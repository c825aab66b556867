"""A photo's new label: what a teacher found, and of the old masks those that it does not explain."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from pycocotools import mask as coco

from model.contract import InputSize
from model.images import Letterbox, plan_letterbox, resize_labels, resize_map
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.panoptic_labels import ImageLabel, merge_panoptic, remove_overlaps
from training.data.photos import PhotoFile
from training.self_training.teacher import THRESHOLDS
from training.self_training.tta_merge import MergedPredictions, TeacherPredictions

_EXPLAINED = 0.5
"""IoU with a teacher's mask from which an old one is left out (CutLER)."""
_UNSEEN = 0.25
"""What the score of an old mask is multiplied by that no view of the teacher finds."""
STUFF_SHARE = 0.5
"""Of the highest chance of a stuff cluster; below, a cell has no label (CUPS)."""


@dataclass(frozen=True, kw_only=True)
class ClassMaxScores:
    """How sure a teacher is at most, over all photos; 0 of what it never found."""

    things: Float[np.ndarray, "K"]
    """Scores of objects, by cluster."""
    stuff: Float[np.ndarray, "S+1"]
    """Chances of cells, by label."""

    @classmethod
    def survey(cls, found: Iterable[MergedPredictions], thing_clusters: int, stuff_clusters: int) -> Self:
        things, stuff = np.zeros(thing_clusters), np.zeros(stuff_clusters + 1)
        for each in found:
            np.maximum.at(things, each.clusters - 1, each.scores)
            np.maximum.at(stuff, each.semantic.ravel(), each.certainty.ravel())
        return cls(things=things, stuff=stuff)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelUpdater:
    """All that makes a photo's new label."""

    read: Callable[[PhotoFile], TeacherPredictions]
    old_masks: Mapping[str, list[dict[str, Any]]]
    """By the photo's hash, as entries of COCO's instances JSON."""
    maxima: ClassMaxScores
    share: float
    """Of its cluster's best score that an object needs to be in the panoptic map."""
    side_px: int
    thing_clusters: int

    def label(self, photo: PhotoFile) -> ImageLabel:
        """All of the teacher's objects by their scores, then unexplained old masks.

        The panoptic map has the sure ones, under them the old ones that the old map had.
        """
        found = self.read(photo).found
        placement = plan_letterbox(photo.height, photo.width, [InputSize.square(self.side_px)], MASK_STRIDE_PX)
        masks, kept = _draw(found, placement)
        things, scores = found.clusters[kept].tolist(), found.scores[kept].tolist()
        old = self._list_unexplained(masks, self.old_masks[photo.digest])
        if old:
            decoded = coco.decode([each["segmentation"] for each in old]).transpose(2, 0, 1).astype(bool)
            masks = np.concatenate([masks, decoded])
        things += [each["category_id"] for each in old]
        scores += [_UNSEEN * min(1.0, float(each.get("score", 1.0))) for each in old]
        is_old_shown = np.array([bool(each.get("in_panoptic", 1)) for each in old], bool)
        is_shown = np.concatenate([self._is_sure(found)[kept], is_old_shown])
        painted = remove_overlaps(masks & is_shown[:, None, None])
        labelled = merge_panoptic(painted, things, self._read_stuff(found, placement), self.thing_clusters)
        return ImageLabel(
            panoptic=labelled,
            masks=masks,
            things=things,
            scores=scores,
            is_in_panoptic=[bool(mask.any()) for mask in painted],
        )

    def count_sure(self, found: MergedPredictions) -> int:
        """Objects that are sure enough for the panoptic map."""
        return int(self._is_sure(found).sum())

    def _is_sure(self, found: MergedPredictions) -> Bool[np.ndarray, "N"]:
        sure: Bool[np.ndarray, "N"] = found.scores >= self.share * self.maxima.things[found.clusters - 1]
        return sure

    def _list_unexplained(self, masks: Bool[np.ndarray, "N H W"], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not len(masks) or not old:
            return old
        encoded = [coco.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
        overlaps = coco.iou([each["segmentation"] for each in old], encoded, [0] * len(encoded))
        return [each for each, best in zip(old, np.array(overlaps).max(1), strict=True) if best < _EXPLAINED]

    def _read_stuff(self, found: MergedPredictions, letterbox: Letterbox) -> Int32[np.ndarray, "H W"]:
        is_sure = found.certainty >= STUFF_SHARE * self.maxima.stuff[found.semantic]
        sure = np.where(is_sure, found.semantic, 0).astype(np.int32)
        return resize_labels(_cut(sure, letterbox), letterbox.height, letterbox.width)


def _draw(found: MergedPredictions, letterbox: Letterbox) -> tuple[Bool[np.ndarray, "n H W"], Int[np.ndarray, "n"]]:
    """The masks that have a pixel, in the photo's size, and their places."""
    cells = [_cut(each, letterbox) for each in found.soft]
    masks = [resize_map(each, letterbox.height, letterbox.width) > THRESHOLDS.mask_threshold for each in cells]
    kept = np.array([place for place, mask in enumerate(masks) if mask.any()], np.int64)
    return np.array([masks[place] for place in kept], bool).reshape(-1, letterbox.height, letterbox.width), kept


def _cut(cells: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """Those that show the photo."""
    return np.ascontiguousarray(cells[: letterbox.map_height, : letterbox.map_width])
