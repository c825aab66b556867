"""Overlays of segments over a photo."""

import colorsys

import cv2
import numpy as np
from jaxtyping import Bool, Integer, UInt8

from model.formats.png import encode_by_opencv
from model.postprocessing.panoptic import Segmentation

JPEG_QUALITY = 88
_GOLDEN_RATIO = 0.618034
_STRIP_ROWS = 256
_BORDER_GRAY = 245
_THING_OPACITY, _STUFF_OPACITY = 0.55, 0.35


def encode_overlay(image: UInt8[np.ndarray, "H W 3"], segmentation: Segmentation) -> bytes:
    """Return the overlay of a segmentation as JPEG. Raises as `encode_jpeg`."""
    return encode_jpeg(draw_overlay(image, segmentation))


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return an image as JPEG. Raises ImageTooLarge above JPEG's limit of 65,500 px per side."""
    return encode_by_opencv(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def draw_overlay(image: UInt8[np.ndarray, "H W 3"], segmentation: Segmentation) -> UInt8[np.ndarray, "H W 3"]:
    """Blend the colors of segments with the image, things stronger than stuff, and draw light borders."""
    count = max((segment.id for segment in segmentation.segments), default=0) + 1
    colors = np.zeros((count, 3), np.float32)
    opacities = np.zeros((count, 1), np.float32)
    for segment in segmentation.segments:
        colors[segment.id] = segment_color(segment.id, segment.is_thing)
        opacities[segment.id] = _THING_OPACITY if segment.is_thing else _STUFF_OPACITY
    overlay = np.empty_like(image)
    for top in range(0, len(image), _STRIP_ROWS):  # as float32, a whole large image takes gigabytes
        strip, labels = image[top : top + _STRIP_ROWS], segmentation.label_map[top : top + _STRIP_ROWS]
        blended = strip + opacities[labels] * (colors[labels] - strip)
        overlay[top : top + _STRIP_ROWS] = blended.round()
    overlay[_find_borders(segmentation.label_map)] = _BORDER_GRAY
    return overlay


def segment_color(segment_id: int, is_thing: bool) -> tuple[int, int, int]:
    """Return the RGB color of a segment; consecutive ids have distant hues. The web page uses the same colors."""
    hue = segment_id * _GOLDEN_RATIO % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if is_thing else 0.4, 1.0 if is_thing else 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _find_borders(labels: Integer[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return pixels whose right or lower neighbor belongs to another segment; wider in large images."""
    borders = np.zeros(labels.shape, np.uint8)
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    borders[:-1] |= labels[:-1] != labels[1:]
    width = max(1, round(max(labels.shape) / 600))
    return cv2.dilate(borders, np.ones((width, width), np.uint8)).astype(bool)
