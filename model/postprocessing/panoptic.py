"""A network's raw answer to segments: instances, the semantic map and the panoptic map."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np
from jaxtyping import Float, Integer, Shaped

from model.contract import Contract, Task, Thresholds
from model.images import Letterbox
from model.network_io import RawOutputs
from model.postprocessing.detections import Detection, decode_detections, extend_detections
from model.postprocessing.masks import PackedMask
from model.postprocessing.upsampling import BilinearUpsampler

VOID = 0
_SEMANTIC_SCORE_FACTOR = 0.25
"""Share of the score threshold from which a detection is in the semantic answer, where nothing else is."""
_MAX_UINT8_ID = 255


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
class Segmentation:
    """The answer to one task, in the picture's own size."""

    label_map: Integer[np.ndarray, "H W"]
    """Segment ids, of as few bytes as they need; 0 is void. Where instances overlap, the best one shows."""
    segments: tuple[Segment, ...]
    masks: tuple[PackedMask, ...] = ()
    """The whole mask of each segment, for instances alone: they may overlap."""


def postprocess(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, task: Task, thresholds: Thresholds
) -> Segmentation:
    """The segments of one picture for one task, as `make_postprocessor` makes them."""
    return make_postprocessor(raw, letterbox, contract, thresholds)(task)


def make_postprocessor(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> Callable[[Task], Segmentation]:
    """What gives the segments of one picture for a task; all tasks share the raw answer and the work on it.

    Panoptic: the paper's merge (detectron2's combine of instance and semantic predictions): instances by descending
    score, those too much covered by better ones dropped, then stuff on what is left. Unlike it, the least stuff area is
    a share of the picture and not a number of pixels. Semantic: the same, all instances of a cluster in one segment,
    small stuff kept, and less sure instances where nothing else is. Instance: every detection with its whole mask.
    """
    low = replace(thresholds, score_threshold=_SEMANTIC_SCORE_FACTOR * thresholds.score_threshold)
    find_sure = cache(lambda: decode_detections(raw, letterbox, contract, thresholds))
    find_all = cache(lambda: extend_detections(raw, letterbox, contract, low, find_sure(), thresholds.score_threshold))
    read_surface = cache(lambda: _read_semantic(raw.semantic, letterbox))

    def start(detections: list[Detection]) -> Shaped[np.ndarray, "H W"]:
        is_small = len(detections) + contract.stuff_clusters <= _MAX_UINT8_ID
        return np.zeros((letterbox.height, letterbox.width), np.uint8 if is_small else np.int32)

    def merge(plane: Shaped[np.ndarray, "H W"], least_share: float) -> list[Segment]:
        segments = _add_things(plane, find_sure(), thresholds.overlap_threshold)
        return segments + _add_stuff(plane, read_surface(), contract, least_share, len(segments) + 1)

    def assemble_task(task: Task) -> Segmentation:
        match task:
            case "instance":
                return _merge_instances(find_sure(), start(find_sure()))
            case "panoptic":
                segments = merge(plane := start(find_sure()), thresholds.min_stuff_area_fraction)
                return Segmentation(label_map=plane, segments=tuple(segments))
            case "semantic":
                segments = merge(plane := start(find_all()), 0.0)
                segments += _add_things(plane, find_all(), 1.0, len(segments) + 1)
                return _merge_by_cluster(Segmentation(label_map=plane, segments=tuple(segments)))

    return assemble_task


def select_clusters(segmentation: Segmentation, clusters: Collection[int]) -> Segmentation:
    """The segments of these clusters alone, under their old ids; the others become void."""
    places = [place for place, segment in enumerate(segmentation.segments) if segment.cluster in clusters]
    table = np.zeros(max((segment.id for segment in segmentation.segments), default=0) + 1, np.int32)
    kept = tuple(segmentation.segments[place] for place in places)
    table[[segment.id for segment in kept]] = [segment.id for segment in kept]
    return Segmentation(
        label_map=table[segmentation.label_map],
        segments=kept,
        masks=tuple(segmentation.masks[place] for place in places) if segmentation.masks else (),
    )


@dataclass(frozen=True, kw_only=True)
class _SemanticMap:
    """The semantic part of a raw answer."""

    winners: Shaped[np.ndarray, "H W"]
    """The best label of every pixel; 0 stands for things."""
    mean_probabilities: Float[np.ndarray, "L"]
    """Each label's mean probability where it wins."""


def _merge_instances(detections: list[Detection], plane: Shaped[np.ndarray, "H W"]) -> Segmentation:
    segments = []
    for number, found in enumerate(detections, start=1):
        segments.append(Segment(id=number, cluster=found.cluster, is_thing=True, score=found.score))
        window, bits = plane[found.mask.window], found.mask.bits
        window += (bits & (window == VOID)) * plane.dtype.type(number)  # adding is quicker than indexing by a mask
    crops = tuple(found.mask for found in detections)
    return Segmentation(label_map=plane, segments=tuple(segments), masks=crops)


def _add_things(
    plane: Shaped[np.ndarray, "H W"], detections: list[Detection], most_covered: float, first_id: int = 1
) -> list[Segment]:
    """Lay detections where a plane is void, best first, and tell which of them got a place."""
    segments: list[Segment] = []
    for found in detections:
        window, bits = plane[found.mask.window], found.mask.bits
        free = bits & (window == VOID)
        left_over = np.count_nonzero(free)
        if not left_over or (area := np.count_nonzero(bits)) - left_over > most_covered * area:
            continue
        identity = first_id + len(segments)
        segments.append(Segment(id=identity, cluster=found.cluster, is_thing=True, score=found.score))
        window += free * plane.dtype.type(identity)
    return segments


def _add_stuff(
    plane: Shaped[np.ndarray, "H W"], surface: _SemanticMap, contract: Contract, least_share: float, first_id: int
) -> list[Segment]:
    """Lay stuff on what is left of a plane, and tell which of it is large enough."""
    least_area = max(1.0, least_share * plane.size)
    left = surface.winners * (plane == VOID)
    segments: list[Segment] = []
    table = np.zeros(len(surface.mean_probabilities), plane.dtype)
    for label in np.flatnonzero(surface.mean_probabilities).tolist():
        if label == VOID or not _has_min_area(left, label, least_area):
            continue
        cluster, score = contract.thing_clusters + label, float(surface.mean_probabilities[label])
        segments.append(Segment(id=first_id + len(segments), cluster=cluster, is_thing=False, score=score))
        table[label] = segments[-1].id
    plane += _look_up(left, table)
    return segments


def _has_min_area(labels: Shaped[np.ndarray, "H W"], label: int, least_area: float) -> bool:
    """Whether a label has so many pixels; for most, every eighth row settles it."""
    return any(np.count_nonzero(part == label) >= least_area for part in (labels[::8], labels))


def _look_up(labels: Shaped[np.ndarray, "H W"], table: Shaped[np.ndarray, "L"]) -> Shaped[np.ndarray, "H W"]:
    """The entry of a table for each label."""
    if labels.dtype == np.uint8 and table.dtype == np.uint8:
        whole = np.zeros(256, np.uint8)
        whole[: len(table)] = table
        return cv2.LUT(labels, whole)  # seven times as fast as an index
    entries: Shaped[np.ndarray, "H W"] = table[labels]
    return entries


def _read_semantic(logits: Float[np.ndarray, "L h w"], letterbox: Letterbox) -> _SemanticMap:
    """The best label of every pixel.

    Only labels that win a cell compete: between cells another could win by a hair, at ten times the cost.
    """
    shown = logits[:, : letterbox.map_height, : letterbox.map_width]
    cells = shown.argmax(0)
    shifted = np.exp(shown - shown.max(0))
    chances = shifted.max(0) / shifted.sum(0)
    counts = np.bincount(cells.ravel(), minlength=len(logits))
    certainties = np.bincount(cells.ravel(), weights=chances.ravel(), minlength=len(logits)) / np.maximum(counts, 1)
    present = np.flatnonzero(counts)
    enlargement = BilinearUpsampler((letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width))
    names = present.astype(np.uint8 if len(logits) <= _MAX_UINT8_ID else np.int32)
    return _SemanticMap(winners=enlargement.argmax(shown[present], names), mean_probabilities=certainties)


def _merge_by_cluster(merged: Segmentation) -> Segmentation:
    """One segment a cluster; its score is the area-weighted mean of its parts."""
    areas = _count_pixels(merged.label_map, len(merged.segments) + 1)
    clusters = sorted({segment.cluster for segment in merged.segments})
    ids = {cluster: index for index, cluster in enumerate(clusters, start=1)}
    table = np.zeros(len(areas), merged.label_map.dtype)
    segments = []
    for cluster in clusters:
        parts = [segment for segment in merged.segments if segment.cluster == cluster]
        table[[part.id for part in parts]] = ids[cluster]
        score = float(np.average([part.score for part in parts], weights=[areas[part.id] for part in parts]))
        segments.append(Segment(id=ids[cluster], cluster=cluster, is_thing=parts[0].is_thing, score=score))
    return Segmentation(label_map=_look_up(merged.label_map, table), segments=tuple(segments))


def _count_pixels(labels: Integer[np.ndarray, "H W"], length: int) -> Float[np.ndarray, "N"]:
    """Pixels of each label below `length`."""
    if labels.dtype != np.uint8:
        return np.bincount(labels.ravel(), minlength=length).astype(np.float64)
    counts: Float[np.ndarray, "N"] = cv2.calcHist([labels], [0], None, [256], [0.0, 256.0]).ravel()[:length]
    return counts  # as bincount's in half of its time
