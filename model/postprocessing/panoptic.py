"""Raw outputs of a network to instance, semantic and panoptic segmentations of the image, with categories."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int, Integer, Shaped

from model.contract import Contract, RawOutputs, Task, Thresholds
from model.embeddings import Category, l2_normalize
from model.images import Letterbox
from model.postprocessing.masks import BilinearUpsampler, Detection, PackedMask, decode_detections

VOID = 0
_SEMANTIC_SCORE_FACTOR = 0.25
"""Detections from this fraction of the score threshold fill pixels that would be void in a semantic segmentation."""
_MAX_UINT8_ID = 255
_POINTS_PER_SIDE = 4
"""Points along each side of a patch at which regions are sampled."""
Statistic = Literal["segments", "void", "score"]
"""Of a panoptic segmentation: number of segments, fraction of void pixels, mean score of its things."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A region of an image."""

    id: int
    """Its value in the label map, from 1."""
    cluster: int
    """As in the contract: things from 1, then stuff."""
    is_thing: bool
    score: float
    """Things: the network's score. Stuff: the mean probability of the cluster over the region."""
    category: Category | None = None
    """Its category; None if neither the segment nor its cluster has one."""
    embedding: Float32[np.ndarray, "E"] | None = field(default=None, repr=False, compare=False)
    """Its mean embedding, of unit length, or zeros for a tiny segment; None if the network has no embeddings."""
    merged_clusters: tuple[int, ...] = ()
    """Clusters of a segment that `merge_categories` made, the largest first, which is `cluster`."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The result of one task, in the size of the image."""

    label_map: Integer[np.ndarray, "H W"]
    """Segment ids in the smallest sufficient type; 0 is void. Of overlapping instances, the best one is shown."""
    segments: tuple[Segment, ...]
    masks: tuple[PackedMask, ...] = ()
    """The complete mask of each segment; for the task "instance" only, as its segments may overlap."""

    def map_clusters(self) -> Shaped[np.ndarray, "H W"]:
        """Return the cluster of each pixel, 0 for void."""
        table = np.zeros(max((segment.id for segment in self.segments), default=0) + 1, np.uint16)
        table[[segment.id for segment in self.segments]] = [segment.cluster for segment in self.segments]
        clusters: Shaped[np.ndarray, "H W"] = table[self.label_map]
        return clusters


@dataclass(frozen=True, kw_only=True)
class PatchEmbeddings:
    """Embeddings of the patches of an input, and where the image lies in it."""

    values: Float32[np.ndarray, "E rows columns"]
    """Unit vectors."""
    letterbox: Letterbox

    def pool_segments(
        self, label_map: Integer[np.ndarray, "H W"], ids: Sequence[int], min_patches: float = 0.0
    ) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding, of unit length, of each segment.

        It is zeros for a segment that covers fewer patches than `min_patches`, or no sampled point.
        """
        ys, xs, patches = self._sample_points(*label_map.shape)
        sampled = label_map[ys[:, None], xs[None]].ravel()
        positions = ids_to_positions(sampled, ids)
        is_listed = positions > 0
        rows = positions[is_listed] - 1
        pooled = self._average(rows, patches.ravel()[is_listed], len(ids))
        is_small = np.bincount(rows, minlength=len(ids)) < min_patches * _POINTS_PER_SIDE**2
        return np.where(is_small[:, None], np.float32(0.0), pooled)

    def pool_masks(self, masks: Sequence[PackedMask], image_size: tuple[int, int]) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding of each mask of an image of this size, as `pool_segments` does."""
        ys, xs, patches = self._sample_points(*image_size)
        rows, cells = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for number, mask in enumerate(masks):
            inside_y, inside_x = ys - mask.top, xs - mask.left
            at_y = np.flatnonzero((inside_y >= 0) & (inside_y < mask.height))
            at_x = np.flatnonzero((inside_x >= 0) & (inside_x < mask.width))
            covered = mask.bits[inside_y[at_y][:, None], inside_x[at_x][None]]
            cells.append(patches[at_y[:, None], at_x[None]][covered])
            rows.append(np.full(len(cells[-1]), number))
        return self._average(np.concatenate(rows), np.concatenate(cells), len(masks))

    def _sample_points(
        self, height: int, width: int
    ) -> tuple[Int[np.ndarray, "Y"], Int[np.ndarray, "X"], Int[np.ndarray, "Y X"]]:
        """Return the rows and columns of points of an image of this size, and the patch of each point."""
        box = self.letterbox
        _, rows, columns = self.values.shape
        ys, patch_rows = _spread_points(rows, box.resized_height / box.input_size.height_px, height)
        xs, patch_columns = _spread_points(columns, box.resized_width / box.input_size.width_px, width)
        return ys, xs, patch_rows[:, None] * columns + patch_columns[None]

    def _average(
        self, rows: Int[np.ndarray, "P"], patches: Int[np.ndarray, "P"], count: int
    ) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding of the patches of each row."""
        flat = self.values.reshape(len(self.values), -1).T
        weights = np.bincount(rows * len(flat) + patches, minlength=count * len(flat)).reshape(count, len(flat))
        return l2_normalize(weights.astype(np.float32) @ flat)


def postprocess(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, task: Task, thresholds: Thresholds
) -> Segmentation:
    """Return the segmentation of an image for one task (see `make_postprocessor`)."""
    return make_postprocessor(raw, letterbox, contract, thresholds)(task)


def make_postprocessor(
    raw: RawOutputs, letterbox: Letterbox, contract: Contract, thresholds: Thresholds
) -> Callable[[Task], Segmentation]:
    """Return a function from task to segmentation of an image; tasks share the work that they have in common.

    Panoptic: detectron2's `combine_semantic_and_instance_outputs`, as in the paper. Instances by descending score,
    without those mostly covered by better ones, then stuff on the remaining pixels. Unlike there, the minimum area of
    stuff is a fraction of the image and not a number of pixels. Semantic: the same, but with one segment per cluster,
    stuff of any size, and instances of lower scores where nothing else is. Instance: all detections with their
    complete masks.
    """
    decode = cache(lambda: decode_detections(raw, letterbox, contract, thresholds))
    decode_semantic = cache(lambda: _decode_semantic(raw.semantic, letterbox))

    def make_label_map(detections: list[Detection]) -> Shaped[np.ndarray, "H W"]:
        is_small = len(detections) + contract.stuff_clusters <= _MAX_UINT8_ID
        return np.zeros((letterbox.height, letterbox.width), np.uint8 if is_small else np.int32)

    def merge(label_map: Shaped[np.ndarray, "H W"], min_stuff_area_fraction: float) -> list[Segment]:
        segments = _add_things([], label_map, decode(), thresholds.overlap_threshold)
        return _add_stuff(segments, label_map, *decode_semantic(), contract, min_stuff_area_fraction)

    def run_task(task: Task) -> Segmentation:
        match task:
            case "instance":
                segments = _add_things([], label_map := make_label_map(decode()), decode(), None)
                masks = tuple(detection.mask for detection in decode())
                return Segmentation(label_map=label_map, segments=tuple(segments), masks=masks)
            case "panoptic":
                segments = merge(label_map := make_label_map(decode()), thresholds.min_stuff_area_fraction)
                return Segmentation(label_map=label_map, segments=tuple(segments))
            case "semantic":
                low = replace(thresholds, score_threshold=_SEMANTIC_SCORE_FACTOR * thresholds.score_threshold)
                detections = decode_detections(raw, letterbox, contract, low, decode(), thresholds.score_threshold)
                segments = merge(label_map := make_label_map(detections), 0.0)
                _add_things(segments, label_map, detections, 1.0)
                segments.sort(key=lambda segment: segment.cluster)
                result = Segmentation(label_map=label_map, segments=tuple(segments))
                return _merge_segments(result, lambda segment: segment.cluster)

    def run_and_categorize(task: Task) -> Segmentation:
        return assign_categories(run_task(task), contract, embed_patches(raw, letterbox))

    return run_and_categorize


def embed_patches(raw: RawOutputs, letterbox: Letterbox) -> PatchEmbeddings | None:
    """Return the embeddings of an image's patches, if the network has them."""
    return None if raw.embeddings is None else PatchEmbeddings(values=raw.embeddings, letterbox=letterbox)


def assign_categories(segmentation: Segmentation, contract: Contract, patches: PatchEmbeddings | None) -> Segmentation:
    """Return the segmentation with the category of each segment: from the examples, or else that of its cluster."""
    segments = segmentation.segments
    embeddings: Sequence[Float32[np.ndarray, "E"] | None] = [None] * len(segments)
    categories = [contract.categories.get(segment.cluster) for segment in segments]
    if patches is not None:
        height, width = segmentation.label_map.shape
        pooled = (
            patches.pool_masks(segmentation.masks, (height, width))
            if segmentation.masks
            else patches.pool_segments(segmentation.label_map, [segment.id for segment in segments])
        )
        embeddings = list(pooled)
        if examples := contract.examples:
            found = examples.classify(pooled, np.array([segment.is_thing for segment in segments], bool))
            categories = [
                own if label < 0 or segment.cluster in examples.except_clusters else examples.categories[label]
                for segment, own, label in zip(segments, categories, found.tolist(), strict=True)
            ]
    return replace(
        segmentation,
        segments=tuple(
            replace(segment, category=category, embedding=embedding)
            for segment, category, embedding in zip(segments, categories, embeddings, strict=True)
        ),
    )


def output_statistics(segmentation: Segmentation) -> dict[Statistic, float]:
    """Return the statistics of a panoptic segmentation; without things there is no score."""
    scores = [segment.score for segment in segmentation.segments if segment.is_thing]
    statistics: dict[Statistic, float] = {
        "segments": float(len(segmentation.segments)),
        "void": np.count_nonzero(segmentation.label_map == VOID) / segmentation.label_map.size,
    }
    return statistics | ({"score": sum(scores) / len(scores)} if scores else {})


def select_segments(segmentation: Segmentation, is_selected: Callable[[Segment], bool]) -> Segmentation:
    """Return the selected segments, with the same ids; the others become void."""
    kept = [index for index, segment in enumerate(segmentation.segments) if is_selected(segment)]
    table = np.zeros(max((segment.id for segment in segmentation.segments), default=0) + 1, np.int32)
    segments = tuple(segmentation.segments[index] for index in kept)
    table[[segment.id for segment in segments]] = [segment.id for segment in segments]
    return Segmentation(
        label_map=table[segmentation.label_map],
        segments=segments,
        masks=tuple(segmentation.masks[index] for index in kept) if segmentation.masks else (),
    )


def merge_categories(segmentation: Segmentation, task: Task) -> Segmentation:
    """Return the segmentation with one segment per category; in a panoptic map, things stay.

    Segments without a category, and instances, stay as well. Segments get new ids.
    """

    def find_category(segment: Segment) -> tuple[str, int]:
        category = segment.category
        is_alone = category is None or task == "instance" or (task == "panoptic" and segment.is_thing)
        return ("segment", segment.id) if category is None or is_alone else ("category", category.id)

    if len({find_category(segment) for segment in segmentation.segments}) == len(segmentation.segments):
        return segmentation
    return _merge_segments(segmentation, find_category)


def _add_things(
    segments: list[Segment],
    label_map: Shaped[np.ndarray, "H W"],
    detections: list[Detection],
    overlap_threshold: float | None,
) -> list[Segment]:
    """Add detections, best first, to the segments and to void pixels of the label map.

    Without a threshold, every detection becomes a segment, even one that is covered completely.
    """
    for detection in detections:
        window, bits = label_map[detection.mask.window], detection.mask.bits
        free = bits & (window == VOID)
        if overlap_threshold is not None:
            free_area = np.count_nonzero(free)
            if not free_area or (area := np.count_nonzero(bits)) - free_area > overlap_threshold * area:
                continue
        number = len(segments) + 1
        segments.append(Segment(id=number, cluster=detection.cluster, is_thing=True, score=detection.score))
        window += free * label_map.dtype.type(number)  # faster than indexing by a mask
    return segments


def _add_stuff(
    segments: list[Segment],
    label_map: Shaped[np.ndarray, "H W"],
    labels: Shaped[np.ndarray, "H W"],
    probabilities: Float[np.ndarray, "L"],
    contract: Contract,
    min_area_fraction: float,
) -> list[Segment]:
    """Add stuff that is large enough, as `_decode_semantic` returns it, like `_add_things`."""
    min_area = max(1.0, min_area_fraction * label_map.size)
    free = labels * (label_map == VOID)
    table = np.zeros(len(probabilities), label_map.dtype)
    for label in np.flatnonzero(probabilities).tolist():
        if label != VOID and _has_min_area(free, label, min_area):
            table[label] = number = len(segments) + 1
            cluster, score = contract.thing_clusters + label, float(probabilities[label])
            segments.append(Segment(id=number, cluster=cluster, is_thing=False, score=score))
    label_map += _look_up(free, table)
    return segments


def _has_min_area(labels: Shaped[np.ndarray, "H W"], label: int, min_area: float) -> bool:
    """Whether a label has that many pixels; for most labels, every eighth row is sufficient to decide."""
    return any(np.count_nonzero(part == label) >= min_area for part in (labels[::8], labels))


def _look_up(labels: Shaped[np.ndarray, "H W"], table: Shaped[np.ndarray, "L"]) -> Shaped[np.ndarray, "H W"]:
    """Return the table's entry for each label."""
    if labels.dtype == np.uint8 and table.dtype == np.uint8:
        complete = np.zeros(256, np.uint8)
        complete[: len(table)] = table
        return cv2.LUT(labels, complete)  # seven times as fast as indexing
    entries: Shaped[np.ndarray, "H W"] = table[labels]
    return entries


def _decode_semantic(
    logits: Float[np.ndarray, "L h w"], letterbox: Letterbox
) -> tuple[Shaped[np.ndarray, "H W"], Float[np.ndarray, "L"]]:
    """Return the best label of each pixel, 0 for things, and the mean probability of each label where it is best.

    Only labels that are best in some cell are considered: another one could be slightly higher between cells, but
    checking that takes ten times as long.
    """
    cropped = logits[:, : letterbox.map_height, : letterbox.map_width]
    best = cropped.argmax(0)
    exponentials = np.exp(cropped - cropped.max(0))
    probabilities = exponentials.max(0) / exponentials.sum(0)
    counts = np.bincount(best.ravel(), minlength=len(logits))
    sums = np.bincount(best.ravel(), weights=probabilities.ravel(), minlength=len(logits))
    present = np.flatnonzero(counts)
    upsampler = BilinearUpsampler((letterbox.map_height, letterbox.map_width), (letterbox.height, letterbox.width))
    labels = present.astype(np.uint8 if len(logits) <= _MAX_UINT8_ID else np.int32)
    return upsampler.argmax(cropped[present], labels), sums / np.maximum(counts, 1)


def _merge_segments(segmentation: Segmentation, key: Callable[[Segment], Hashable]) -> Segmentation:
    """Merge segments with equal keys, in order of the first; the score is the mean, weighted by area."""
    groups: dict[Hashable, list[Segment]] = {}
    for segment in segmentation.segments:
        groups.setdefault(key(segment), []).append(segment)
    areas = _count_pixels(segmentation.label_map, max((each.id for each in segmentation.segments), default=0) + 1)
    table = np.zeros(len(areas), segmentation.label_map.dtype)
    segments = []
    for number, members in enumerate(groups.values(), start=1):
        table[[segment.id for segment in members]] = number
        weights = [areas[segment.id] for segment in members]
        score = float(np.average([segment.score for segment in members], weights=weights))
        largest = members[int(np.argmax(weights))]
        others = sorted({segment.cluster for segment in members} - {largest.cluster})
        merged = (largest.cluster, *others) if others else ()
        segments.append(replace(largest, id=number, score=score, merged_clusters=merged))
    return Segmentation(label_map=_look_up(segmentation.label_map, table), segments=tuple(segments))


def _count_pixels(labels: Integer[np.ndarray, "H W"], length: int) -> Float[np.ndarray, "N"]:
    """Return the number of pixels of each label below `length`."""
    if labels.dtype != np.uint8:
        return np.bincount(labels.ravel(), minlength=length).astype(np.float64)
    counts: Float[np.ndarray, "N"] = cv2.calcHist([labels], [0], None, [256], [0.0, 256.0]).ravel()[:length]
    return counts  # as from bincount, in half of its time


def _spread_points(patches: int, covered: float, length: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return the pixels of points along one side of an image, and their patches; the image covers a part of them."""
    centers = (np.arange(patches * _POINTS_PER_SIDE) + 0.5) / (patches * _POINTS_PER_SIDE)
    inside = np.flatnonzero(centers < covered)
    return (centers[inside] / covered * length).astype(np.int64).clip(max=length - 1), inside // _POINTS_PER_SIDE


def ids_to_positions(ids: Integer[np.ndarray, "*S"], listed: Iterable[int]) -> Int[np.ndarray, "*S"]:
    """Return the positions of segment ids in a list of them, counted from 1; 0 for ids that are not listed."""
    keys = np.array(list(listed), np.int64)
    if not keys.size:
        return np.zeros(ids.shape, np.int64)
    order = np.argsort(keys)
    nearest = order[np.searchsorted(keys, ids, sorter=order).clip(max=len(keys) - 1)]
    return np.where(keys[nearest] == ids, nearest + 1, 0)
