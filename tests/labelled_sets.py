"""Tiny copies of the folders in which labelled sets are published, drawn by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from model.formats.encoders import encode_panoptic_png

HEIGHT, WIDTH = 4, 6


def write_photo(path: Path, *, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Noise: no two photos are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_plane(path: Path, values: Int[np.ndarray, "H W"]) -> None:
    """A one-channel PNG, 16 bits where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.uint16)).save(path)


def write_palette(path: Path, values: Int[np.ndarray, "H W"]) -> None:
    """A palette PNG, as VOC's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8)).convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette([index for index in range(256) for _ in range(3)])
    picture.save(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_panoptic_png(path: Path, label_map: Int[np.ndarray, "H W"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_panoptic_png(label_map.astype(np.int32)))


def quarter(left: int = 1, top: int = 2, *, fill: int = 3) -> Int[np.ndarray, "H W"]:
    """`left` in the upper left half, `top` beside it, `fill` below."""
    plane = np.full((HEIGHT, WIDTH), fill)
    plane[:2, :3], plane[:2, 3:] = left, top
    return plane
