"""Small inputs for the whole pipeline: drawn photos and an encoder with random weights."""

import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.runs import RunInfo, write_run
from model.contract import Contract, InputSize, RawOutputs
from model.files import hash_file
from model.formats.image_files import encode_panoptic_png
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.vit import EncoderConfig, VisionTransformer
from training.data.dataset import LabeledPhoto
from training.data.label_config import PseudoLabelConfig
from training.data.photos import PhotoFile, hash_photos, scan_photos

SIDE_PX = 56
SHAPE = EncoderConfig(embed_dim=64, depth=4, patch_px=14, grid_size=4, num_registers=0, has_layer_scale=True)
INPUT_SIZES = tuple(InputSize(height_px=height, width_px=width) for height, width in ((96, 128), (128, 96), (96, 96)))

CASCADE = CascadeConfig(
    thing_clusters=3,
    stuff_clusters=2,
    stem_out_channels=8,
    bottleneck_channels=4,
    res2_out_channels=16,
    backbone_norm="batch",
    fpn_channels=8,
    fpn_norm="batch",
    box_fc_dim=16,
    mask_conv_dim=8,
    sem_seg_conv_dim=32,
)


def draw_photos(folder: Path, count: int = 8) -> Path:
    """Draw photos of one disc each, in several sizes and colors."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        image = np.full((48 + 4 * index, 64, 3), generator.integers(10, 90, 3), np.uint8)
        centre = (int(generator.integers(20, 44)), 24 + index)
        cv2.circle(image, centre, int(generator.integers(10, 16)), generator.integers(120, 255, 3).tolist(), -1)
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


def write_labeled(
    folder: Path, name: str, image: np.ndarray, label_map: np.ndarray, categories: dict[int, int]
) -> LabeledPhoto:
    """Write a photo and its panoptic label; the name is also the digest."""
    path, label = folder / f"{name}.png", folder / f"{name}.label.png"
    cv2.imwrite(str(path), image)
    label.write_bytes(encode_panoptic_png(label_map))
    size = {"height": image.shape[0], "width": image.shape[1]}
    return LabeledPhoto(path=path, name=path.name, digest=name, label=label, categories=categories, **size)


def draw_noise(batch: int, height: int, width: int) -> Tensor:
    """uint8 images of noise, B 3 H W."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def write_encoder(path: Path) -> Path:
    """Random weights under DINOv2's names."""
    torch.manual_seed(0)
    encoder = VisionTransformer(SHAPE)
    torch.nn.init.normal_(encoder.pos_embed, std=0.2)
    save_file(encoder.state_dict(), path)
    return path


def configure(photos: Path, encoder: Path) -> tuple[tuple[PhotoFile, ...], PseudoLabelConfig]:
    """Scan photos and return a small configuration: three thing and four stuff clusters."""
    scanned = scan_photos(photos).photos
    config = PseudoLabelConfig(
        photos=str(photos),
        photos_hash=hash_photos(scanned),
        encoder=str(encoder),
        encoder_hash=hash_file(encoder),
        side_px=SIDE_PX,
        proposals="maskcut",
        maskcut_n=2,
        maskcut_tau=0.6,
        layers=(2, 3),
        pca_dim=6,
        thing_clusters=3,
        stuff_clusters=4,
        stuff="kmeans",
        data_source="drawn",
    )
    return scanned, config


def write_checkpoint(path: Path) -> Path:
    """A checkpoint of three clusters as detectron2 writes U2Seg's."""
    torch.save({"model": draw_cascade(stuff_clusters=27).state_dict(), "iteration": 89_999}, path)
    return path


def write_cascade_run(run: Path) -> Path:
    """An imported run of a small panoptic cascade."""
    network = draw_cascade(stuff_clusters=2)
    card = RunInfo(network="panoptic_cascade", network_config=network.config, step=0, provenance={"weights": "drawn"})
    write_run(run, card, network)
    return run


def draw_cascade(stuff_clusters: int) -> PanopticCascade:
    """A small panoptic cascade, its weights drawn so that it detects things of all three clusters."""
    torch.manual_seed(0)
    shape = replace(CASCADE, stuff_clusters=stuff_clusters)
    network = PanopticCascade(shape, CascadeInferenceConfig())
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, module in network.named_modules():
        if name.endswith("conv3.norm"):
            torch.nn.init.constant_(module.weight, 0.3)  # else a deep network of random weights amplifies rounding
    for predictor in network.roi_heads.box_predictor:
        predictor.cls_score.weight.data *= 0.2  # else all scores are 1/3, 2/3 or 1
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.01)  # else boxes leave the image
    return network


def draw_truth(folder: Path, count: int = 4) -> Path:
    """Labelled images in COCO's panoptic format: a disc (cat) in front of a wall."""
    (folder / "panoptic").mkdir(parents=True)
    draw_photos(folder / "images", count)
    segments = [{"id": 7, "category_id": 17, "iscrowd": 0}, {"id": 300, "category_id": 171, "iscrowd": 0}]
    annotations = []
    for index in range(count):
        image = cv2.imread(str(folder / "images" / f"{index}.png"))
        label_map = np.where((image != image[0, 0]).any(2), 7, 300).astype(np.int32)
        (folder / "panoptic" / f"{index}.png").write_bytes(encode_panoptic_png(label_map))
        annotations.append({"image_id": index + 1, "file_name": f"{index}.png", "segments_info": segments})
    categories = [
        {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
        {"id": 171, "name": "wall-brick", "supercategory": "wall", "isthing": 0},
    ]
    images = [{"id": index + 1, "file_name": f"{index}.png"} for index in range(count)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder


class FixedSession:
    """Returns its outputs in turn, one per image."""

    backend = "fixed"

    def __init__(self, *outputs: RawOutputs) -> None:
        self._outputs = cycle(outputs)

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        return [next(self._outputs) for _ in pixels]


def make_contract(thing_clusters: int, stuff_clusters: int, side_px: int = 8, **more: Any) -> Contract:
    """The contract of a network for squares of one size, without files."""
    given = {"name": "a", "version": "1", "network": "none", "stride_px": 4, "max_detections": 4}
    given |= {"input_sizes": (InputSize.square(side_px),), **more}
    return Contract(thing_clusters=thing_clusters, stuff_clusters=stuff_clusters, **given)
