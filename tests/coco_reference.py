"""Masks as pycocotools encodes them, to compare our codecs with."""

from typing import Any

import numpy as np
from pycocotools import mask as coco

from model.formats.coco import Rle


def encode_by_pycocotools(mask: np.ndarray) -> Rle:
    """Encode a mask with pycocotools."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    left, top, width, height = (int(value) for value in coco.toBbox(rle))
    return Rle(
        size=(mask.shape[0], mask.shape[1]),
        counts=rle["counts"].decode("ascii"),
        area=int(coco.area(rle)),
        bbox=(left, top, width, height),
    )


def annotate(mask: np.ndarray, category: int, **more: Any) -> dict[str, Any]:
    """A COCO annotation with a compressed RLE."""
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {"category_id": category, "segmentation": {"size": list(mask.shape), "counts": counts}, **more}
