"""Segments in the formats people and programs read."""

import base64
import colorsys
import io
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt8, UInt16

from model.contract import Contract
from model.errors import ImageTooLarge
from model.formats.png import PNG_SIGNATURE, encode_png
from model.formats.polygons import mask_to_polygons
from model.formats.rle import Rle, decode_rle, encode_label_map, encode_mask
from model.postprocessing.panoptic import Segment, Segmentation

JPEG_QUALITY = 88
_GOLDEN_RATIO = 0.618034
_STRIP_ROWS = 256
_BORDER_SHADE = 245
_MAX_UINT8 = 255


def encode_rles(segmentation: Segmentation) -> list[Rle]:
    """One outline a segment, in their order; overlapping instances keep their whole masks."""
    if segmentation.masks:
        size = segmentation.label_map.shape
        return [encode_mask(crop.bits, crop.top, crop.left, size) for crop in segmentation.masks]
    return encode_label_map(segmentation.label_map, [segment.id for segment in segmentation.segments])


def to_segments_info(segmentation: Segmentation, contract: Contract) -> list[dict[str, Any]]:
    """COCO's `segments_info`, a JSON object a segment, in their order; the category is null while it has no name."""
    return [
        _segment_properties(segment, outline, contract)
        | {"segmentation": {"size": list(outline.size), "counts": outline.counts}}
        for segment, outline in zip(segmentation.segments, encode_rles(segmentation), strict=True)
    ]


def to_geojson_features(segmentation: Segmentation, contract: Contract) -> list[dict[str, Any]]:
    """GeoJSON's `features`, a multipolygon a segment in pixels from the upper left; rings are NumPy arrays."""
    features = []
    for segment, outline in zip(segmentation.segments, encode_rles(segmentation), strict=True):
        left, top, width, height = outline.bbox
        parts = mask_to_polygons(decode_rle(outline)[top : top + height, left : left + width], top=top, left=left)
        geometry = {"type": "MultiPolygon", "coordinates": [[part.outer, *part.holes] for part in parts]}
        properties = _segment_properties(segment, outline, contract)
        features.append({"type": "Feature", "id": segment.id, "geometry": geometry, "properties": properties})
    return features


def to_hf_masks(segmentation: Segmentation, contract: Contract) -> list[dict[str, Any]]:
    """What Hugging Face's image-segmentation task answers: label, score and a mask as grey PNG in base64."""
    entries = []
    for segment, outline in zip(segmentation.segments, encode_rles(segmentation), strict=True):
        category = contract.categories.get(segment.cluster)
        mask = encode_png(decode_rle(outline).view(np.uint8) * np.uint8(255))
        entries.append(
            {
                "label": category.name if category else f"LABEL_{segment.cluster}",
                "score": round(segment.score, 4),
                "mask": base64.b64encode(mask).decode("ascii"),
            }
        )
    return entries


def _segment_properties(segment: Segment, outline: Rle, contract: Contract) -> dict[str, Any]:
    category = contract.categories.get(segment.cluster)
    return {
        "id": segment.id,
        "cluster_id": segment.cluster,
        "category_id": category.id if category else None,
        "category_name": category.name if category else None,
        "isthing": segment.is_thing,
        "score": round(segment.score, 4),
        "area": outline.area,
        "bbox": list(outline.bbox),
    }


def to_npz(segmentation: Segmentation, contract: Contract) -> bytes:
    """A compressed npz: the label map, and a row for each segment, in their order.

    Masks that overlap come as bits beside it: those of segment i, in its box and row by row, eight to a byte, begin at
    byte `mask_starts[i]` of `masks`.
    """
    outlines = encode_rles(segmentation)
    segments = segmentation.segments
    named = [contract.categories.get(segment.cluster) for segment in segments]
    packed = [crop.packed for crop in segmentation.masks]
    arrays: dict[str, Any] = {
        "label_map": segmentation.label_map,
        "ids": np.array([segment.id for segment in segments], np.int32),
        "clusters": np.array([segment.cluster for segment in segments], np.int32),
        "category_ids": np.array([category.id if category else -1 for category in named], np.int64),
        "categories": np.array([category.name if category else "" for category in named], np.str_),
        "isthing": np.array([segment.is_thing for segment in segments], bool),
        "scores": np.array([segment.score for segment in segments], np.float32),
        "areas": np.array([outline.area for outline in outlines], np.int64),
        "bboxes": np.array([outline.bbox for outline in outlines], np.int32).reshape(-1, 4),
        "masks": np.concatenate(packed) if packed else np.zeros(0, np.uint8),
        "mask_starts": np.cumsum([0, *(len(each) for each in packed)])[:-1],
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def encode_cluster_png(segmentation: Segmentation, contract: Contract) -> bytes:
    """A grey PNG with the cluster of every pixel, 0 for none; 16 bits where the contract has more than 255 clusters."""
    table = np.zeros(max((segment.id for segment in segmentation.segments), default=0) + 1, np.uint16)
    table[[segment.id for segment in segmentation.segments]] = [each.cluster for each in segmentation.segments]
    clusters = table[segmentation.label_map]
    if contract.thing_clusters + contract.stuff_clusters <= _MAX_UINT8:
        return encode_png(clusters.astype(np.uint8))
    return _encode_image(".png", clusters, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def encode_panoptic_png(label_map: Integer[np.ndarray, "H W"]) -> bytes:
    """COCO's panoptic format: 8-bit RGB, id = R + 256 G + 65536 B, 0 is void."""
    most = int(label_map.max(initial=0))
    empty = np.zeros(label_map.shape, np.uint8)
    channels = [label_map.astype(np.uint8)]  # the low byte
    channels += [(label_map >> shift).astype(np.uint8) if most >> shift else empty for shift in (8, 16)]
    return encode_png(cv2.merge(channels))


def decode_panoptic_png(content: bytes) -> Int32[np.ndarray, "H W"]:
    """The label map of a COCO panoptic PNG. Raises ValueError if the bytes are no such picture."""
    is_png = content.startswith(PNG_SIGNATURE)
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if is_png else None
    except cv2.error as error:  # more pixels than OpenCV takes
        raise ValueError("no panoptic PNG: its size is refused") from error
    if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        raise ValueError("no panoptic PNG: expected 8-bit RGB")
    blue, green, red = (channel.astype(np.int32) for channel in cv2.split(picture))
    return red + 256 * green + 65_536 * blue


def encode_overlay(image: UInt8[np.ndarray, "H W 3"], segmentation: Segmentation) -> bytes:
    """A JPEG of the picture with its segments coloured and outlined."""
    return _encode_image(".jpg", draw_overlay(image, segmentation)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def draw_overlay(image: UInt8[np.ndarray, "H W 3"], segmentation: Segmentation) -> UInt8[np.ndarray, "H W 3"]:
    """The picture under its segments: things strong, stuff pale, void untouched, a light line between."""
    count = max((segment.id for segment in segmentation.segments), default=0) + 1
    colours = np.zeros((count, 3), np.float32)
    strengths = np.zeros((count, 1), np.float32)
    for segment in segmentation.segments:
        colours[segment.id] = segment_color(segment.id, segment.is_thing)
        strengths[segment.id] = 0.55 if segment.is_thing else 0.35
    painted = np.empty_like(image)
    for top in range(0, len(image), _STRIP_ROWS):  # in floats, the whole of a large picture would take gigabytes
        strip, labels = image[top : top + _STRIP_ROWS], segmentation.label_map[top : top + _STRIP_ROWS]
        mixed = strip + strengths[labels] * (colours[labels] - strip)
        painted[top : top + _STRIP_ROWS] = mixed.round()
    painted[_find_borders(segmentation.label_map)] = _BORDER_SHADE
    return painted


def segment_color(segment_id: int, is_thing: bool) -> tuple[int, int, int]:
    """RGB; neighbours in number lie far apart in hue. The page draws with the same rule."""
    hue = segment_id * _GOLDEN_RATIO % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if is_thing else 0.4, 1.0 if is_thing else 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _find_borders(labels: Integer[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels whose right or lower neighbour is another segment; thicker on large pictures."""
    borders = np.zeros(labels.shape, np.uint8)
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    borders[:-1] |= labels[:-1] != labels[1:]
    thickness = max(1, round(max(labels.shape) / 600))
    return cv2.dilate(borders, np.ones((thickness, thickness), np.uint8)).astype(bool)


def _encode_image(
    suffix: str, picture: UInt8[np.ndarray, "H W 3"] | UInt16[np.ndarray, "H W"], options: list[int]
) -> bytes:
    """Raises ImageTooLarge where the format has no room for the picture's sides (JPEG: 65,500 px)."""
    try:
        is_done, content = cv2.imencode(suffix, picture, options)
    except cv2.error:
        is_done = False
    if not is_done:
        height, width = picture.shape[:2]
        raise ImageTooLarge(f"a {width}x{height} picture does not fit into a {suffix} file: ask for application/json")
    return content.tobytes()
