"""Raw detections of a network to binary masks in the size of the image."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float

from model.contract import Contract, Thresholds
from model.images import Letterbox
from model.network_io import RawOutputs
from model.postprocessing.masks import PackedMask, pack_mask, packed_mask_iou, paste_mask
from model.postprocessing.upsampling import BilinearUpsampler


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object."""

    cluster: int
    """As in the contract, from 1."""
    score: float
    mask: PackedMask


def decode_detections(
    raw: RawOutputs,
    letterbox: Letterbox,
    contract: Contract,
    thresholds: Thresholds,
    better: Sequence[Detection] = (),
    max_score: float = math.inf,
) -> list[Detection]:
    """Return detections above the score threshold that are not empty, best first, without duplicates.

    They follow those in `better`, which were decoded before, and score below `max_score`.
    """
    soft = _list_soft_detections(raw, letterbox, contract, thresholds, max_score)
    detections = list(better)
    for found, mask in zip(soft, _upsample_masks(soft, letterbox, contract, thresholds), strict=True):
        if mask and not _is_duplicate(mask, detections, thresholds):
            detections.append(Detection(cluster=found.cluster, score=found.score, mask=mask))
    return detections


def split_components(probabilities: Float[np.ndarray, "h w"], thresholds: Thresholds) -> list[Float[np.ndarray, "h w"]]:
    """Return the mask once per connected component that is large enough, largest first, without the other ones."""
    if not thresholds.min_component_area_fraction:
        return [probabilities]
    cells = (probabilities > thresholds.mask_threshold).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(cells)
    if not width:
        return []
    count, _ = cv2.connectedComponents(cells[top : top + height, left : left + width], connectivity=8)
    if count == 2:  # the background counts as one, even if it is empty
        return [probabilities]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    min_area = thresholds.min_component_area_fraction * areas.max()
    kept = [index for index in np.argsort(-areas, kind="stable") if areas[index] >= min_area]
    return [np.where((labels == 0) | (labels == index + 1), probabilities, np.float32(0.0)) for index in kept]


@dataclass(frozen=True, kw_only=True)
class _SoftDetection:
    cluster: int
    score: float
    box: Float[np.ndarray, "4"]
    probabilities: Float[np.ndarray, "h w"]


def _list_soft_detections(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds, max_score: float
) -> list[_SoftDetection]:
    """Return detections with a score from the threshold to below `max_score`, best first, masks as the network's."""
    found = []
    for index in np.argsort(-raw.scores, kind="stable"):
        score = float(raw.scores[index])
        if score < thresholds.score_threshold or not score > 0.0:  # NaN is neither
            break
        if score >= max_score:
            continue
        mask = raw.masks[index]
        if not contract.box_mask_size:
            mask = mask[: letterbox.map_height, : letterbox.map_width]
        cluster, box = int(raw.clusters[index]) + 1, raw.boxes[index]
        found += [
            _SoftDetection(cluster=cluster, score=score, box=box, probabilities=component)
            for component in split_components(mask, thresholds)
        ]
    return found


def _upsample_masks(
    soft: list[_SoftDetection], letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> Iterator[PackedMask | None]:
    """Yield each mask in the size of the image; None for one that is empty there."""
    if contract.box_mask_size:
        for each in soft:
            yield _paste(each, letterbox, thresholds)
    elif soft:
        upsampler = BilinearUpsampler((letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width))
        maps = np.stack([each.probabilities for each in soft])
        for patch in upsampler.threshold(maps, thresholds.mask_threshold):
            yield pack_mask(patch.bits, top=patch.top, left=patch.left) if patch else None


def _paste(soft: _SoftDetection, letterbox: Letterbox, thresholds: Thresholds) -> PackedMask | None:
    limits = np.array([letterbox.width, letterbox.height] * 2)
    scale = limits / np.array([letterbox.resized_width, letterbox.resized_height] * 2)
    box = (soft.box * scale).clip(0.0, limits)
    pasted = paste_mask(soft.probabilities, box, letterbox.height, letterbox.width)
    return pack_mask(pasted.probabilities > thresholds.mask_threshold, top=pasted.top, left=pasted.left)


def _is_duplicate(mask: PackedMask, better: list[Detection], thresholds: Thresholds) -> bool:
    limit = thresholds.duplicate_iou_threshold
    return limit < 1.0 and any(packed_mask_iou(mask, each.mask) > limit for each in better)
