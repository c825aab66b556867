"""Segmentations as COCO's JSON, GeoJSON, NumPy archives, and the responses of Hugging Face's image-segmentation task.

COCO's panoptic annotations pass panopticapi's checks: the ids in the PNG and in `segments_info` are the same, and every
category is listed.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from model.category_examples import Category
from model.contract import Contract
from model.formats.png import encode_png
from model.formats.polygons import Polygon, mask_to_polygons
from model.formats.rle import Rle, decode_rle, encode_label_map, encode_mask
from model.postprocessing.panoptic import Segment, Segmentation

MaskFormat = Literal["rle", "polygons"]


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


def get_category_id(segment: Segment, contract: Contract) -> int:
    """Return the category id of a segment; without a category, that of its cluster."""
    return segment.category.id if segment.category else get_cluster_category_id(segment.cluster, contract)


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
    return {
        "category_id": get_category_id(segment, contract),
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
