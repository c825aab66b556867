"""A network's raw answer to segments: instances, the semantic map and the panoptic map."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8

from model.contract import Contract, Task, Thresholds
from model.paste import paste
from model.pixels import Placement, restore
from model.raw import Raw

VOID = 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One region of a picture."""

    id: int
    """Its value in the label map, from 1."""
    cluster: int
    """Numbered as in the contract: things from 1, stuff above them."""
    is_thing: bool
    score: float
    """Things: the network's score. Stuff: the mean probability of the cluster over the region."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A mask inside its box, eight pixels a byte: many large masks may be held at once."""

    top: int
    left: int
    height: int
    width: int
    packed: UInt8[np.ndarray, "bytes"]

    @property
    def bits(self) -> Bool[np.ndarray, "h w"]:
        """The mask, unpacked anew."""
        flat = np.unpackbits(self.packed, count=self.height * self.width)
        return flat.view(bool).reshape(self.height, self.width)


def pack_crop(bits: Bool[np.ndarray, "H W"], *, top: int = 0, left: int = 0) -> Crop | None:
    """The mask, which begins at `top` and `left`, inside the box around its pixels; None if it has none."""
    x, y, width, height = cv2.boundingRect(bits.view(np.uint8)) if bits.size else (0, 0, 0, 0)
    if not width:
        return None
    packed = np.packbits(bits[y : y + height, x : x + width])
    return Crop(top=top + y, left=left + x, height=height, width=width, packed=packed)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The answer to one task, in the picture's own size."""

    label_map: Int32[np.ndarray, "H W"]
    """Segment ids; 0 is void. Where instances overlap, the best one shows."""
    segments: tuple[Segment, ...]
    crops: tuple[Crop, ...] = ()
    """The whole mask of each segment, for instances alone: they may overlap."""


def assemble(raw: Raw, placement: Placement, contract: Contract, task: Task, thresholds: Thresholds) -> Segmentation:
    """The segments of one picture for one task; all tasks come from the same raw answer.

    Panoptic: the paper's merge (detectron2's combine of instance and semantic predictions): instances by descending
    score, those too much covered by better ones dropped, then stuff on what is left. Unlike it, the least stuff area is
    a share of the picture and not a number of pixels. Semantic: the same, all instances of a cluster in one segment,
    small stuff kept. Instance: every detection with its whole mask.
    """
    detections = _detect(raw, placement, contract, thresholds)
    match task:
        case "instance":
            return _show_instances(detections, placement)
        case "panoptic":
            return _merge(detections, raw, placement, contract, thresholds)
        case "semantic":
            return _group(_merge(detections, raw, placement, contract, _keep_small_stuff(thresholds)))


@dataclass(frozen=True, kw_only=True)
class _Detection:
    cluster: int
    score: float
    crop: Crop


def _detect(raw: Raw, placement: Placement, contract: Contract, thresholds: Thresholds) -> list[_Detection]:
    """Detections that pass the score threshold and have a pixel, best first."""
    found = []
    for index in np.argsort(-raw.scores, kind="stable"):
        score = float(raw.scores[index])
        if score < thresholds.score or not score > 0.0:  # NaN fails both ways round
            break
        soft = raw.masks[index]
        if not contract.box_mask_side:
            soft = soft[: placement.map_height, : placement.map_width]
        for part in _split(soft, thresholds):
            if crop := _draw(part, raw.boxes[index], placement, contract, thresholds):
                found.append(_Detection(cluster=int(raw.clusters[index]) + 1, score=score, crop=crop))
    return found


def _draw(
    soft: Float[np.ndarray, "h w"],
    box: Float[np.ndarray, "4"],
    placement: Placement,
    contract: Contract,
    thresholds: Thresholds,
) -> Crop | None:
    """The mask in the picture's own size; None if it has no pixel there."""
    if not contract.box_mask_side:
        return pack_crop(restore(soft, placement) > thresholds.mask)
    limits = np.array([placement.width, placement.height] * 2)
    scale = limits / np.array([placement.placed_width, placement.placed_height] * 2)
    patch = paste(soft, (box * scale).clip(0.0, limits), placement.height, placement.width)
    return pack_crop(patch.soft > thresholds.mask, top=patch.top, left=patch.left)


def _split(soft: Float[np.ndarray, "h w"], thresholds: Thresholds) -> list[Float[np.ndarray, "h w"]]:
    """The mask once for each connected part that is large enough, largest first, the other parts taken out."""
    if not thresholds.part:
        return [soft]
    cells = (soft > thresholds.mask).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = [
        number
        for number in np.argsort(-areas, kind="stable")
        if areas[number] >= thresholds.part * areas.max(initial=0)
    ]
    return [np.where((labels == 0) | (labels == number + 1), soft, np.float32(0.0)) for number in kept]


def _show_instances(detections: list[_Detection], placement: Placement) -> Segmentation:
    label_map = np.zeros((placement.height, placement.width), np.int32)
    segments = tuple(
        Segment(id=index, cluster=found.cluster, is_thing=True, score=found.score)
        for index, found in enumerate(detections, start=1)
    )
    for segment, found in reversed(list(zip(segments, detections, strict=True))):
        _window(label_map, found.crop)[found.crop.bits] = segment.id
    return Segmentation(label_map=label_map, segments=segments, crops=tuple(found.crop for found in detections))


def _merge(
    detections: list[_Detection], raw: Raw, placement: Placement, contract: Contract, thresholds: Thresholds
) -> Segmentation:
    label_map = np.zeros((placement.height, placement.width), np.int32)
    segments: list[Segment] = []
    for found in detections:
        window = _window(label_map, found.crop)
        bits = found.crop.bits
        free = bits & (window == VOID)
        area, left_over = int(bits.sum()), int(free.sum())
        if not left_over or area - left_over > thresholds.overlap * area:
            continue
        segments.append(Segment(id=len(segments) + 1, cluster=found.cluster, is_thing=True, score=found.score))
        window[free] = segments[-1].id
    least_area = max(1.0, thresholds.stuff_area * label_map.size)
    winners, certainties = _read_semantic(raw.semantic, placement)
    is_free = label_map == VOID
    areas = np.bincount(winners[is_free], minlength=len(certainties))
    for label in range(1, len(areas)):
        if areas[label] < least_area:
            continue
        cluster = contract.thing_clusters + label
        segments.append(Segment(id=len(segments) + 1, cluster=cluster, is_thing=False, score=float(certainties[label])))
        label_map[is_free & (winners == label)] = segments[-1].id
    return Segmentation(label_map=label_map, segments=tuple(segments))


def _read_semantic(
    logits: Float[np.ndarray, "L h w"], placement: Placement
) -> tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "L"]]:
    """The best label of every pixel, and each label's mean probability where it wins.

    Only labels that win a cell are enlarged: between cells another could win by a hair, at ten times the cost.
    """
    shown = logits[:, : placement.map_height, : placement.map_width]
    cells = shown.argmax(0)
    shifted = np.exp(shown - shown.max(0))
    chances = shifted.max(0) / shifted.sum(0)
    counts = np.bincount(cells.ravel(), minlength=len(logits))
    certainties = np.bincount(cells.ravel(), weights=chances.ravel(), minlength=len(logits)) / np.maximum(counts, 1)
    present = np.flatnonzero(counts)
    winners = np.full((placement.height, placement.width), present[0], np.int32)
    if len(present) > 1:
        best = restore(logits[present[0]], placement)
        for label in present[1:]:
            challenger = restore(logits[label], placement)
            winners[challenger > best] = label
            np.maximum(best, challenger, out=best)
    return winners, certainties


def _group(merged: Segmentation) -> Segmentation:
    """One segment a cluster; its score is the area-weighted mean of its parts."""
    areas = np.bincount(merged.label_map.ravel(), minlength=len(merged.segments) + 1)
    clusters = sorted({segment.cluster for segment in merged.segments})
    ids = {cluster: index for index, cluster in enumerate(clusters, start=1)}
    table = np.zeros(len(areas), np.int32)
    segments = []
    for cluster in clusters:
        parts = [segment for segment in merged.segments if segment.cluster == cluster]
        table[[part.id for part in parts]] = ids[cluster]
        score = float(np.average([part.score for part in parts], weights=[areas[part.id] for part in parts]))
        segments.append(Segment(id=ids[cluster], cluster=cluster, is_thing=parts[0].is_thing, score=score))
    return Segmentation(label_map=table[merged.label_map], segments=tuple(segments))


def _keep_small_stuff(thresholds: Thresholds) -> Thresholds:
    return replace(thresholds, stuff_area=0.0)


def _window(label_map: Int32[np.ndarray, "H W"], crop: Crop) -> Int32[np.ndarray, "h w"]:
    return label_map[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
