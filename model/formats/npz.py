"""Segmentations as NumPy archives."""

import io
from typing import Any

import numpy as np

from model.formats.coco import encode_rles
from model.postprocessing.panoptic import Segmentation


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
