"""The whole way in small: drawn photos and an encoder of random weights."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from model.encodings import encode_panoptic_png
from model.files import hash_file
from model.network.vit import EncoderShape, VisionTransformer
from training.label import hash_photos
from training.photos import Scan, scan_photos
from training.store import LabelConfig

SIDE_PX = 56
SHAPE = EncoderShape(width=64, depth=4, patch_px=14, grid=4, registers=0, has_layer_scale=True)


def draw_photos(folder: Path, count: int = 8) -> Path:
    """Photos of one disc each, of several sizes and colours."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        image = np.full((48 + 4 * index, 64, 3), generator.integers(10, 90, 3), np.uint8)
        centre = (int(generator.integers(20, 44)), 24 + index)
        cv2.circle(image, centre, int(generator.integers(10, 16)), generator.integers(120, 255, 3).tolist(), -1)
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


def write_encoder(path: Path) -> Path:
    """Random weights under DINOv2's names."""
    torch.manual_seed(0)
    encoder = VisionTransformer(SHAPE)
    torch.nn.init.normal_(encoder.pos_embed, std=0.2)
    save_file(encoder.state_dict(), path)
    return path


def configure(photos: Path, encoder: Path) -> tuple[Scan, LabelConfig]:
    """What `useg-train label` would be asked for: three thing and four stuff clusters."""
    scan = scan_photos(photos)
    config = LabelConfig(
        photos=str(photos),
        photos_hash=hash_photos(scan.photos),
        encoder=str(encoder),
        encoder_hash=hash_file(encoder),
        side_px=SIDE_PX,
        cuts=2,
        threshold=0.6,
        components=6,
        thing_clusters=3,
        stuff_clusters=4,
        note="drawn",
    )
    return scan, config


def draw_truth(folder: Path) -> Path:
    """Four labelled pictures in COCO's panoptic format: a disc (cat) in front of a wall."""
    (folder / "panoptic").mkdir(parents=True)
    draw_photos(folder / "images", count=4)
    segments = [{"id": 7, "category_id": 17, "iscrowd": 0}, {"id": 300, "category_id": 171, "iscrowd": 0}]
    annotations = []
    for index in range(4):
        image = cv2.imread(str(folder / "images" / f"{index}.png"))
        label_map = np.where((image != image[0, 0]).any(2), 7, 300).astype(np.int32)
        (folder / "panoptic" / f"{index}.png").write_bytes(encode_panoptic_png(label_map))
        annotations.append({"image_id": index + 1, "file_name": f"{index}.png", "segments_info": segments})
    categories = [
        {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
        {"id": 171, "name": "wall-brick", "supercategory": "wall", "isthing": 0},
    ]
    images = [{"id": index + 1, "file_name": f"{index}.png"} for index in range(4)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder
