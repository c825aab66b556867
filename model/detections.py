"""The objects in a raw answer, with their masks in the picture's own size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float

from model.contract import Contract, Thresholds
from model.crops import Crop, measure_iou, pack_crop
from model.enlargement import Enlargement
from model.paste import paste
from model.pixels import Placement
from model.raw import Raw


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object."""

    cluster: int
    """Numbered as in the contract, from 1."""
    score: float
    crop: Crop


def find_detections(raw: Raw, placement: Placement, contract: Contract, thresholds: Thresholds) -> list[Detection]:
    """Detections that pass the score threshold and have a pixel, best first, without duplicates."""
    return find_further(raw, placement, contract, thresholds, [], math.inf)


def find_further(
    raw: Raw, placement: Placement, contract: Contract, thresholds: Thresholds, better: list[Detection], below: float
) -> list[Detection]:
    """The better ones, found before, and after them those that score below as well."""
    parts = _list_parts(raw, placement, contract, thresholds, below)
    found = list(better)
    for part, crop in zip(parts, _draw(parts, placement, contract, thresholds), strict=True):
        if crop and not _is_duplicate(crop, found, thresholds):
            found.append(Detection(cluster=part.cluster, score=part.score, crop=crop))
    return found


@dataclass(frozen=True, kw_only=True)
class _Part:
    cluster: int
    score: float
    box: Float[np.ndarray, "4"]
    soft: Float[np.ndarray, "h w"]


def _list_parts(
    raw: Raw, placement: Placement, contract: Contract, thresholds: Thresholds, below: float
) -> list[_Part]:
    """What passes the score threshold and lies below a score, best first, in the cells of the network."""
    parts = []
    for index in np.argsort(-raw.scores, kind="stable"):
        score = float(raw.scores[index])
        if score < thresholds.score or not score > 0.0:  # NaN fails both ways round
            break
        if score >= below:
            continue
        whole = raw.masks[index]
        if not contract.box_mask_side:
            whole = whole[: placement.map_height, : placement.map_width]
        cluster, box = int(raw.clusters[index]) + 1, raw.boxes[index]
        parts += [_Part(cluster=cluster, score=score, box=box, soft=soft) for soft in split(whole, thresholds)]
    return parts


def _draw(
    parts: list[_Part], placement: Placement, contract: Contract, thresholds: Thresholds
) -> Iterator[Crop | None]:
    """Each mask in the picture's own size; None for one that has no pixel there."""
    if contract.box_mask_side:
        for part in parts:
            yield _paste(part, placement, thresholds)
    elif parts:
        enlargement = Enlargement((placement.map_height, placement.map_width), (placement.height, placement.width))
        for cut in enlargement.exceed(np.stack([part.soft for part in parts]), thresholds.mask):
            yield pack_crop(cut.bits, top=cut.top, left=cut.left) if cut else None


def _paste(part: _Part, placement: Placement, thresholds: Thresholds) -> Crop | None:
    limits = np.array([placement.width, placement.height] * 2)
    scale = limits / np.array([placement.placed_width, placement.placed_height] * 2)
    patch = paste(part.soft, (part.box * scale).clip(0.0, limits), placement.height, placement.width)
    return pack_crop(patch.soft > thresholds.mask, top=patch.top, left=patch.left)


def split(soft: Float[np.ndarray, "h w"], thresholds: Thresholds) -> list[Float[np.ndarray, "h w"]]:
    """The mask once for each connected part that is large enough, largest first, the other parts taken out."""
    if not thresholds.part:
        return [soft]
    cells = (soft > thresholds.mask).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(cells)
    if not width:
        return []
    count, _ = cv2.connectedComponents(cells[top : top + height, left : left + width], connectivity=8)
    if count == 2:  # what is not in a part counts as one, even if there is nothing
        return [soft]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = [number for number in np.argsort(-areas, kind="stable") if areas[number] >= thresholds.part * areas.max()]
    return [np.where((labels == 0) | (labels == number + 1), soft, np.float32(0.0)) for number in kept]


def _is_duplicate(crop: Crop, better: list[Detection], thresholds: Thresholds) -> bool:
    """Whether a better detection, of whatever cluster, covers the same pixels."""
    return thresholds.duplicate < 1.0 and any(measure_iou(crop, each.crop) > thresholds.duplicate for each in better)
