"""Segmentations as COCO's RLE and JSON, GeoJSON, NumPy archives, and the responses of Hugging Face's
image-segmentation task.

The runs of all segments of a label map are found at once, and pycocotools compresses them: at 2.5 megapixels with 30
segments this takes 1 ms, and encoding one mask after the other 56.

COCO's panoptic annotations pass panopticapi's checks: the ids in the PNG and in `segments_info` are the same, and every
category is listed.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Bool, Int64, Shaped
from pycocotools import mask as coco

from model.contract import Contract
from model.embeddings import Category
from model.formats.image_files import encode_png
from model.formats.polygons import Polygon, mask_to_polygons
from model.postprocessing.panoptic import Segment, Segmentation

MaskFormat = Literal["rle", "polygons"]

_COUNTS = re.compile(r"(?:[P-o]{0,6}[0-O])+")
"""Compressed runs: characters from "0" are five bits each, lowest first, seven for 32 bits; from "P" one follows."""


@dataclass(frozen=True, kw_only=True)
class Rle:
    """A mask as COCO's RLE, in the size of the image."""

    size: tuple[int, int]
    """Height, width."""
    counts: str
    """Compressed RLE, column-major."""
    area: int
    bbox: tuple[int, int, int, int]
    """x, y, width, height."""


def encode_label_map(labels: Shaped[np.ndarray, "H W"], ids: list[int]) -> list[Rle]:
    """Return the RLE of each id, which must not be negative."""
    if not ids:
        return []
    if labels.dtype.itemsize > 1 and labels.max() < 256:
        labels = labels.astype(np.uint8)
    column_major = np.asarray(cv2.transpose(labels)).ravel()
    starts = np.concatenate([[0], np.flatnonzero(column_major[1:] != column_major[:-1]) + 1])
    ends = np.append(starts[1:], column_major.size)
    values = column_major[starts]
    order = np.argsort(values, kind="stable")
    first, last = np.searchsorted(values[order], [ids, [each + 1 for each in ids]])
    chosen = [order[start:end] for start, end in zip(first, last, strict=True)]
    return _encode_runs([(starts[runs], ends[runs]) for runs in chosen], labels.shape)


def encode_mask(bits: Bool[np.ndarray, "h w"], top: int, left: int, size: tuple[int, ...]) -> Rle:
    """Return the RLE of a mask at `top` and `left` in an image of the given size (height, width)."""
    height, width = bits.shape
    columns = np.zeros((width, height + 2), np.uint8)  # unset pixels between columns end every run with its column
    columns[:, 1:-1] = cv2.transpose(bits.view(np.uint8))
    flat = columns.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    positions = (left + changes // (height + 2)) * size[0] + top + changes % (height + 2) - 1
    starts, ends = positions[::2], positions[1::2]
    continues = np.flatnonzero(starts[1:] == ends[:-1])  # from the end of a column to the start of the next
    starts, ends = np.delete(starts, continues + 1), np.delete(ends, continues)
    (rle,) = _encode_runs([(starts, ends)], size)
    return rle


def decode_rle(rle: Rle) -> Bool[np.ndarray, "H W"]:
    bits: Bool[np.ndarray, "H W"] = coco.decode({"size": list(rle.size), "counts": rle.counts}).astype(bool)
    return bits


def parse_counts(text: str) -> Int64[np.ndarray, "L"]:
    """Return the run lengths of COCO's compressed RLE, unset runs first.

    pycocotools decodes a text that is too short or damaged without an error, or never ends. Raises ValueError for a
    character or an end that the format does not have; the sum of the runs is not checked.
    """
    if not _COUNTS.fullmatch(text):
        raise ValueError("not a compressed RLE")
    digits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits < 32)
    starts = np.append(0, ends[:-1] + 1)
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    lengths = np.add.reduceat((digits & 31) << shifts, starts)
    lengths -= np.where(digits[ends] & 16, 1 << (shifts[ends] + 5), 0)  # the highest bit of a run is its sign
    for first in (1, 2):  # from the fourth on, runs are stored as the difference to the one two before
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths


def encode_rles(segmentation: Segmentation) -> list[Rle]:
    """Return the RLE of each segment, in order; overlapping instances have their complete masks."""
    if segmentation.masks:
        size = segmentation.label_map.shape
        return [encode_mask(mask.bits, mask.top, mask.left, size) for mask in segmentation.masks]
    return encode_label_map(segmentation.label_map, [segment.id for segment in segmentation.segments])


def to_segments_info(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Return COCO's `segments_info` with RLE masks; segments without a category have null."""
    return [
        segment_properties(segment, rle) | {"segmentation": {"size": list(rle.size), "counts": rle.counts}}
        for segment, rle in zip(segmentation.segments, encode_rles(segmentation), strict=True)
    ]


def segment_properties(segment: Segment, rle: Rle) -> dict[str, Any]:
    """Return the fields of a segment that all JSON formats share."""
    category = segment.category
    return {
        "id": segment.id,
        "cluster_id": segment.cluster,
        "cluster_ids": list(segment.merged_clusters or [segment.cluster]),
        "category_id": category.id if category else None,
        "category_name": category.name if category else None,
        "isthing": int(segment.is_thing),
        "score": round(segment.score, 4),
        "area": rle.area,
        "bbox": list(rle.bbox),
    }


def list_coco_categories(contract: Contract) -> list[dict[str, Any]]:
    """Return COCO's `categories`: those of the contract and its examples, and one per cluster without a name."""
    categories: dict[int, dict[str, Any]] = {}
    if examples := contract.examples:
        for index, known in enumerate(examples.categories):
            categories.setdefault(known.id, _to_coco_category(known, is_thing=index < examples.num_things))
    for cluster in range(1, contract.thing_clusters + contract.stuff_clusters + 1):
        unnamed = Category(id=get_cluster_category_id(cluster, contract), name=f"cluster {cluster}")
        category = contract.categories.get(cluster, unnamed)
        categories.setdefault(category.id, _to_coco_category(category, is_thing=contract.is_thing(cluster)))
    return [categories[category_id] for category_id in sorted(categories)]


def get_cluster_category_id(cluster: int, contract: Contract) -> int:
    """Return the category id of a cluster; one above all others if it has no name."""
    if named := contract.categories.get(cluster):
        return named.id
    examples = contract.examples.categories if contract.examples else ()
    return max((category.id for category in (*contract.categories.values(), *examples)), default=0) + cluster


def to_coco_annotation(segmentation: Segmentation, contract: Contract, image_id: int, file_name: str) -> dict[str, Any]:
    """Return COCO's panoptic annotation of a PNG; overlapping instances are reduced to what the PNG shows."""
    rles = encode_label_map(segmentation.label_map, [segment.id for segment in segmentation.segments])
    segments_info = [
        {"id": segment.id, "isthing": int(segment.is_thing), **_annotate(segment, rle, contract)}
        for segment, rle in zip(segmentation.segments, rles, strict=True)
        if rle.area
    ]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments_info}


def to_coco_instances(segmentation: Segmentation, contract: Contract, mask_format: MaskFormat) -> list[dict[str, Any]]:
    """Return COCO's instance annotations of all segments, of things and stuff; the caller adds `id` and `image_id`."""
    annotations = []
    for segment, rle in zip(segmentation.segments, encode_rles(segmentation), strict=True):
        mask: Any = {"size": list(rle.size), "counts": rle.counts}
        if mask_format == "polygons":
            mask = [polygon.to_coco() for polygon in _to_polygons(rle)]
        if rle.area:
            annotations.append({**_annotate(segment, rle, contract), "segmentation": mask})
    return annotations


def _annotate(segment: Segment, rle: Rle, contract: Contract) -> dict[str, Any]:
    """Return the fields that COCO's panoptic and instance annotations share."""
    category = segment.category
    return {
        "category_id": category.id if category else get_cluster_category_id(segment.cluster, contract),
        "cluster_id": segment.cluster,
        "score": round(segment.score, 4),
        "area": rle.area,
        "bbox": list(rle.bbox),
        "iscrowd": 0,
    }


def to_coco_dataset(
    contract: Contract, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return COCO's JSON of several images; instances, unlike panoptic annotations, are numbered from 1."""
    return {
        "info": {"description": f"{contract.name} {contract.version}"},
        "images": images,
        "annotations": [
            {"id": number, **annotation} if "segmentation" in annotation else annotation
            for number, annotation in enumerate(annotations, start=1)
        ],
        "categories": list_coco_categories(contract),
    }


def to_geojson_features(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Return GeoJSON's `features`: a multipolygon per segment, in pixels; rings are NumPy arrays."""
    features = []
    for segment, rle in zip(segmentation.segments, encode_rles(segmentation), strict=True):
        geometry = {"type": "MultiPolygon", "coordinates": [[each.outer, *each.holes] for each in _to_polygons(rle)]}
        properties = segment_properties(segment, rle)
        features.append({"type": "Feature", "id": segment.id, "geometry": geometry, "properties": properties})
    return features


def to_hf_masks(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Return the response of Hugging Face's image-segmentation task: label, score, and mask as gray PNG in base64."""
    masks = []
    for segment, rle in zip(segmentation.segments, encode_rles(segmentation), strict=True):
        category = segment.category
        mask = encode_png(decode_rle(rle).view(np.uint8) * np.uint8(255))
        masks.append(
            {
                "label": category.name if category else f"LABEL_{segment.cluster}",
                "score": round(segment.score, 4),
                "mask": base64.b64encode(mask).decode("ascii"),
            }
        )
    return masks


def to_npz(segmentation: Segmentation) -> bytes:
    """Return a compressed npz file: the label map, and arrays with one row per segment.

    For overlapping masks, `masks` has the bits of all masks, each inside its box and in row order, eight per byte; the
    mask of segment i starts at byte `mask_starts[i]`.
    """
    rles = encode_rles(segmentation)
    segments = segmentation.segments
    categories = [segment.category for segment in segments]
    packed = [mask.packed for mask in segmentation.masks]
    arrays: dict[str, Any] = {
        "label_map": segmentation.label_map,
        "ids": np.array([segment.id for segment in segments], np.int32),
        "clusters": np.array([segment.cluster for segment in segments], np.int32),
        "category_ids": np.array([category.id if category else -1 for category in categories], np.int64),
        "categories": np.array([category.name if category else "" for category in categories], np.str_),
        "isthing": np.array([segment.is_thing for segment in segments], bool),
        "scores": np.array([segment.score for segment in segments], np.float32),
        "areas": np.array([rle.area for rle in rles], np.int64),
        "bboxes": np.array([rle.bbox for rle in rles], np.int32).reshape(-1, 4),
        "masks": np.concatenate(packed) if packed else np.zeros(0, np.uint8),
        "mask_starts": np.cumsum([0, *(len(each) for each in packed)])[:-1],
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _to_coco_category(category: Category, *, is_thing: bool) -> dict[str, Any]:
    supercategory = "thing" if is_thing else "stuff"
    return {"id": category.id, "name": category.name, "supercategory": supercategory, "isthing": int(is_thing)}


def _to_polygons(rle: Rle) -> list[Polygon]:
    left, top, width, height = rle.bbox
    return mask_to_polygons(decode_rle(rle)[top : top + height, left : left + width], top=top, left=left)


def _encode_runs(
    masks: Sequence[tuple[Int64[np.ndarray, "R"], Int64[np.ndarray, "R"]]], size: tuple[int, ...]
) -> list[Rle]:
    """Return the RLE of masks, each given by the starts and ends of its runs of set pixels in column-major order."""
    height, width = size
    uncompressed = []
    for starts, ends in masks:
        counts = np.diff(np.stack([starts, ends], axis=1).ravel(), prepend=0, append=height * width)
        uncompressed.append({"size": [height, width], "counts": counts if counts[-1] else counts[:-1]})
    rles = coco.frPyObjects(uncompressed, height, width)
    areas, boxes = coco.area(rles).tolist(), coco.toBbox(rles).astype(int).tolist()
    return [
        Rle(size=(height, width), counts=rle["counts"].decode("ascii"), area=area, bbox=(left, top, across, down))
        for rle, area, (left, top, across, down) in zip(rles, areas, boxes, strict=True)
    ]
