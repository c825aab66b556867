"""The objects in a raw answer, with their masks in the picture's own size."""

import math
from collections.abc import Iterator
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
    """One object."""

    cluster: int
    """Numbered as in the contract, from 1."""
    score: float
    mask: PackedMask


def decode_detections(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> list[Detection]:
    """Detections that pass the score threshold and have a pixel, best first, without duplicates."""
    return extend_detections(raw, letterbox, contract, thresholds, [], math.inf)


def extend_detections(
    raw: RawOutputs,
    letterbox: Letterbox,
    contract: Contract,
    thresholds: Thresholds,
    better: list[Detection],
    below: float,
) -> list[Detection]:
    """The better ones, found before, and after them those that score below as well."""
    parts = _list_soft_detections(raw, letterbox, contract, thresholds, below)
    found = list(better)
    for part, crop in zip(parts, _upsample_masks(parts, letterbox, contract, thresholds), strict=True):
        if crop and not _is_duplicate(crop, found, thresholds):
            found.append(Detection(cluster=part.cluster, score=part.score, mask=crop))
    return found


@dataclass(frozen=True, kw_only=True)
class _SoftDetection:
    cluster: int
    score: float
    box: Float[np.ndarray, "4"]
    probabilities: Float[np.ndarray, "h w"]


def _list_soft_detections(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds, below: float
) -> list[_SoftDetection]:
    """What passes the score threshold and lies below a score, best first, in the cells of the network."""
    parts = []
    for index in np.argsort(-raw.scores, kind="stable"):
        score = float(raw.scores[index])
        if score < thresholds.score_threshold or not score > 0.0:  # NaN fails both ways round
            break
        if score >= below:
            continue
        whole = raw.masks[index]
        if not contract.box_mask_size:
            whole = whole[: letterbox.map_height, : letterbox.map_width]
        cluster, box = int(raw.clusters[index]) + 1, raw.boxes[index]
        parts += [
            _SoftDetection(cluster=cluster, score=score, box=box, probabilities=soft)
            for soft in split_components(whole, thresholds)
        ]
    return parts


def _upsample_masks(
    parts: list[_SoftDetection], letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> Iterator[PackedMask | None]:
    """Each mask in the picture's own size; None for one that has no pixel there."""
    if contract.box_mask_size:
        for part in parts:
            yield _paste(part, letterbox, thresholds)
    elif parts:
        enlargement = BilinearUpsampler(
            (letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width)
        )
        for cut in enlargement.threshold(np.stack([part.probabilities for part in parts]), thresholds.mask_threshold):
            yield pack_mask(cut.bits, top=cut.top, left=cut.left) if cut else None


def _paste(part: _SoftDetection, letterbox: Letterbox, thresholds: Thresholds) -> PackedMask | None:
    limits = np.array([letterbox.width, letterbox.height] * 2)
    scale = limits / np.array([letterbox.resized_width, letterbox.resized_height] * 2)
    patch = paste_mask(part.probabilities, (part.box * scale).clip(0.0, limits), letterbox.height, letterbox.width)
    return pack_mask(patch.probabilities > thresholds.mask_threshold, top=patch.top, left=patch.left)


def split_components(probabilities: Float[np.ndarray, "h w"], thresholds: Thresholds) -> list[Float[np.ndarray, "h w"]]:
    """The mask once for each connected part that is large enough, largest first, the other parts taken out."""
    if not thresholds.min_component_area_fraction:
        return [probabilities]
    cells = (probabilities > thresholds.mask_threshold).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(cells)
    if not width:
        return []
    count, _ = cv2.connectedComponents(cells[top : top + height, left : left + width], connectivity=8)
    if count == 2:  # what is not in a part counts as one, even if there is nothing
        return [probabilities]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = [
        number
        for number in np.argsort(-areas, kind="stable")
        if areas[number] >= thresholds.min_component_area_fraction * areas.max()
    ]
    return [np.where((labels == 0) | (labels == number + 1), probabilities, np.float32(0.0)) for number in kept]


def _is_duplicate(mask: PackedMask, better: list[Detection], thresholds: Thresholds) -> bool:
    """Whether a better detection, of whatever cluster, covers the same pixels."""
    return thresholds.duplicate_iou_threshold < 1.0 and any(
        packed_mask_iou(mask, each.mask) > thresholds.duplicate_iou_threshold for each in better
    )
