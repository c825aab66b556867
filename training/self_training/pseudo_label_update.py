"""Makes the new label of a photo from a teacher's predictions, and from old masks that the teacher did not find."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from pycocotools import mask as coco

from model.contract import InputSize
from model.images import Letterbox, plan_letterbox, resize_labels, resize_map
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.panoptic_labels import ImageLabel, merge_panoptic, remove_overlaps
from training.data.photos import PhotoFile
from training.self_training.teacher import THRESHOLDS
from training.self_training.tta_merge import TeacherPredictions

MIN_RELATIVE_STUFF_PROB = 0.5
"""Pixels below this fraction of their stuff cluster's maximum probability become void (CUPS)."""
_SAME_MASK_IOU = 0.5
"""An old mask with this IoU with a predicted one is dropped (CutLER)."""
_OLD_SCORE_FACTOR = 0.25
"""Factor of the score of old masks that the teacher did not find."""


def compute_thresholds(
    predictions: Iterable[TeacherPredictions], min_relative_score: float, thing_clusters: int, stuff_clusters: int
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "S+1"]]:
    """Return the minimum score of each thing cluster and the minimum probability of each semantic class.

    Both are fractions of the teacher's maximum for the class over all photos.
    """
    things, stuff = np.zeros(thing_clusters), np.zeros(stuff_clusters + 1)
    for each in predictions:
        np.maximum.at(things, each.clusters - 1, each.scores)
        np.maximum.at(stuff, each.semantic.ravel(), each.semantic_probs.ravel())
    return min_relative_score * things, MIN_RELATIVE_STUFF_PROB * stuff


@dataclass(frozen=True, kw_only=True)
class PseudoLabelUpdater:
    """Makes the new labels of a round."""

    predict: Callable[[PhotoFile], TeacherPredictions]
    old_instances: Mapping[str, list[dict[str, Any]]]
    """COCO annotations by the photo's hash."""
    min_scores: Float[np.ndarray, "K"]
    """Minimum score of an instance in the panoptic map, by thing cluster."""
    min_stuff_probs: Float[np.ndarray, "S+1"]
    side_px: int

    def make_label(self, photo: PhotoFile) -> ImageLabel:
        """Return all predicted instances with their scores, followed by old masks that were not found.

        The panoptic map gets the predicted instances of high score and, below them, the old masks that it had before.
        """
        predicted = self.predict(photo)
        letterbox = plan_letterbox(photo.height, photo.width, [InputSize.square(self.side_px)], MASK_STRIDE_PX)
        masks, kept = _upsample_masks(predicted, letterbox)
        is_confident = predicted.scores >= self.min_scores[predicted.clusters - 1]
        clusters, scores = predicted.clusters[kept].tolist(), predicted.scores[kept].tolist()
        old = self._find_missed(masks, self.old_instances[photo.digest])
        if old:
            decoded = coco.decode([each["segmentation"] for each in old]).transpose(2, 0, 1).astype(bool)
            masks = np.concatenate([masks, decoded])
        clusters += [each["category_id"] for each in old]
        scores += [_OLD_SCORE_FACTOR * min(1.0, float(each.get("score", 1.0))) for each in old]
        was_in_panoptic = np.array([bool(each.get("in_panoptic", 1)) for each in old], bool)
        is_candidate = np.concatenate([is_confident[kept], was_in_panoptic])
        visible = remove_overlaps(masks & is_candidate[:, None, None])
        return ImageLabel(
            panoptic=merge_panoptic(visible, clusters, self._stuff_map(predicted, letterbox), len(self.min_scores)),
            masks=masks,
            things=clusters,
            scores=scores,
            is_in_panoptic=[bool(mask.any()) for mask in visible],
        )

    def _find_missed(self, masks: Bool[np.ndarray, "N H W"], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the old annotations that match no predicted mask."""
        if not len(masks) or not old:
            return old
        encoded = [coco.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
        ious = coco.iou([each["segmentation"] for each in old], encoded, [0] * len(encoded))
        return [each for each, best in zip(old, np.array(ious).max(1), strict=True) if best < _SAME_MASK_IOU]

    def _stuff_map(self, predicted: TeacherPredictions, letterbox: Letterbox) -> Int32[np.ndarray, "H W"]:
        is_confident = predicted.semantic_probs >= self.min_stuff_probs[predicted.semantic]
        stuff = np.where(is_confident, predicted.semantic, 0).astype(np.int32)
        return resize_labels(_crop_photo(stuff, letterbox), letterbox.height, letterbox.width)


def _upsample_masks(
    predicted: TeacherPredictions, letterbox: Letterbox
) -> tuple[Bool[np.ndarray, "n H W"], Int[np.ndarray, "n"]]:
    """Return the masks that are not empty at the photo's size, and their indices."""
    maps = [_crop_photo(each, letterbox) for each in predicted.mask_probs]
    masks = [resize_map(each, letterbox.height, letterbox.width) > THRESHOLDS.mask_threshold for each in maps]
    kept = np.array([index for index, mask in enumerate(masks) if mask.any()], np.int64)
    return np.array([masks[index] for index in kept], bool).reshape(-1, letterbox.height, letterbox.width), kept


def _crop_photo(values: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """Remove the padding of a map."""
    return np.ascontiguousarray(values[: letterbox.map_height, : letterbox.map_width])
