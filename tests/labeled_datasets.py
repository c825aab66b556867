"""Draws tiny labeled datasets in their published layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from model.formats.image_files import encode_panoptic_png

HEIGHT, WIDTH = 4, 6


def write_photo(path: Path, *, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Write noise: no two photos are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_label_png(path: Path, values: Int[np.ndarray, "H W"]) -> None:
    """Write a one-channel PNG, of 16 bits where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.uint16)).save(path)


def write_palette_png(path: Path, values: Int[np.ndarray, "H W"]) -> None:
    """Write a palette PNG, like those of VOC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([255 - index for index in range(256) for _ in range(3)])
    image.save(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_panoptic_png(path: Path, label_map: Int[np.ndarray, "H W"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_panoptic_png(label_map.astype(np.int32)))


def three_regions(left: int = 1, right: int = 2, *, bottom: int = 3) -> Int[np.ndarray, "H W"]:
    """Return a label map with two regions in the upper half and one below."""
    label_map = np.full((HEIGHT, WIDTH), bottom)
    label_map[:2, :3], label_map[:2, 3:] = left, right
    return label_map
