"""COCO, COCO-Stuff and UVO in their published layouts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from model.errors import LabelStoreError
from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    read_label_png,
    read_panoptic_dataset,
    require_files,
    require_size,
)
from training.evaluation.datasets.taxonomy import COCO_STUFF_27, ClassGrouping, Taxonomy, build_thing_taxonomy

_COCO_STUFF_CROP_PX = 320


@dataclass(frozen=True, kw_only=True)
class CocoInstanceAnnotation:
    """Objects of a COCO instance file, which may overlap."""

    entries: tuple[dict[str, Any], ...]
    source_to_index: dict[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def read(self, height: int, width: int) -> GroundTruthLabels:
        objects = tuple(
            _parse_object(entry, self.source_to_index[entry["category_id"]], height, width) for entry in self.entries
        )
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=objects)


@dataclass(frozen=True, kw_only=True)
class ClassPngAnnotation:
    """A PNG with a class for each pixel."""

    path: Path
    source_to_index: dict[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Each class is one segment, whose id is the category index + 1."""
        class_map = read_label_png(self.path)
        require_size(self.path, class_map, height, width)
        table = np.zeros(max(int(class_map.max()) + 1, 256), np.int32)
        for value, index in self.source_to_index.items():
            table[value] = index + 1
        label_map = table[class_map]
        segments = {int(segment): int(segment) - 1 for segment in np.unique(label_map) if segment}
        return GroundTruthLabels(label_map=label_map, segments=segments, crowds=frozenset(), objects=())


def read_coco_panoptic(folder: Path, split: str, grouping: ClassGrouping) -> GroundTruthDataset:
    """Read `annotations/panoptic_SPLIT.json`, `annotations/panoptic_SPLIT/*.png`, `SPLIT/*.jpg`."""
    index = folder / "annotations" / f"panoptic_{split}.json"
    return read_panoptic_dataset(folder, index, folder / split, index.with_suffix(""), grouping)


def read_coco_instances(folder: Path, split: str) -> GroundTruthDataset:
    """Read `annotations/instances_SPLIT.json`, `SPLIT/*.jpg`; images without an object are included."""
    return read_instances(folder, folder / "annotations" / f"instances_{split}.json", folder / split)


def read_uvo_frames(folder: Path, split: str) -> GroundTruthDataset:
    """Read `FrameSet/UVO_frame_SPLIT.json`, `uvo_videos_sparse_frames/VIDEO/*.png`; without the category "other"."""
    index = folder / "FrameSet" / f"UVO_frame_{split}.json"
    return read_instances(folder, index, folder / "uvo_videos_sparse_frames", without=("other",))


def read_instances(folder: Path, index: Path, photos: Path, *, without: tuple[str, ...] = ()) -> GroundTruthDataset:
    """Read a dataset in COCO's instance format, without categories whose name starts with one of `without`.

    Raises LabelStoreError if something is missing or inconsistent.
    """
    try:
        content = json.loads(index.read_bytes())
        images = [(image["id"], photos / image["file_name"]) for image in content["images"]]
        taxonomy = build_thing_taxonomy(content["categories"], without=without)
        listed = {category["id"] for category in content["categories"]}
        entries: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id, _ in images}
        for entry in content["annotations"]:
            if entry["category_id"] not in listed:
                raise ValueError(f"category {entry['category_id']} is not listed")
            entries[entry["image_id"]].append(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is not a dataset in COCO's instance format: {error!r}") from error
    return _make_dataset(folder, index.stem, taxonomy, images, entries)


def read_uvo_videos(folder: Path, split: str) -> GroundTruthDataset:
    """Read `VideoDenseSet/UVO_video_SPLIT_dense.json`, `uvo_videos_dense_frames/VIDEO/*.png`; one image per frame."""
    index = folder / "VideoDenseSet" / f"UVO_video_{split}_dense.json"
    frames = folder / "uvo_videos_dense_frames"
    try:
        content = json.loads(index.read_bytes())
        image_ids = {}
        images: list[tuple[int, Path]] = []
        for video in content["videos"]:
            for frame, name in enumerate(video["file_names"]):
                image_ids[video["id"], frame] = len(images) + 1
                images.append((len(images) + 1, frames / name))
        taxonomy = build_thing_taxonomy(content["categories"], without=("other",))
        entries: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id, _ in images}
        for track in content["annotations"]:
            for frame, segmentation in enumerate(track["segmentations"]):
                if segmentation:
                    entry = {"category_id": track["category_id"], "segmentation": segmentation}
                    image_id = image_ids[track["video_id"], frame]
                    entries[image_id].append({**entry, "iscrowd": track.get("iscrowd", 0)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is not a UVO video dataset: {error!r}") from error
    return _make_dataset(folder, index.stem, taxonomy, images, entries)


def read_coco_stuff(folder: Path, split: str) -> GroundTruthDataset:
    """Read `images/SPLIT/*.jpg`, `annotations/SPLIT/*.png` of COCO-Stuff-164k in the 27 classes of PiCIE and STEGO.

    As there, evaluated on the central 320-pixel square of the image scaled to a shorter side of 320.
    Unlike there, the network sees the whole image, and all images count: to use a curated list, keep only its labels.
    """
    labels = sorted((folder / "annotations" / split).glob("*.png"))
    images = tuple(
        GroundTruthImage(
            image_id=image_id,
            path=folder / "images" / split / f"{label.stem}.jpg",
            annotation=ClassPngAnnotation(path=label, source_to_index=COCO_STUFF_27.source_to_index),
        )
        for image_id, label in enumerate(labels, start=1)
    )
    name = f"{folder.resolve().name}, {split}, center crop of {_COCO_STUFF_CROP_PX} px"
    dataset = GroundTruthDataset(
        name=name, kind="semantic", taxonomy=COCO_STUFF_27, images=images, crop_px=_COCO_STUFF_CROP_PX
    )
    require_files(folder, dataset)
    return dataset


def _make_dataset(
    folder: Path,
    name: str,
    taxonomy: Taxonomy,
    paths: Iterable[tuple[int, Path]],
    entries: dict[int, list[dict[str, Any]]],
) -> GroundTruthDataset:
    images = []
    for image_id, path in sorted(paths):
        kept = tuple(entry for entry in entries[image_id] if entry["category_id"] in taxonomy.source_to_index)
        annotation = CocoInstanceAnnotation(entries=kept, source_to_index=taxonomy.source_to_index)
        images.append(GroundTruthImage(image_id=image_id, path=path, annotation=annotation))
    name = f"{folder.resolve().name}, {name}"
    dataset = GroundTruthDataset(name=name, kind="masks", taxonomy=taxonomy, images=tuple(images))
    require_files(folder, dataset)
    return dataset


def _parse_object(entry: dict[str, Any], category: int, height: int, width: int) -> GroundTruthObject:
    """Convert polygons, uncompressed or compressed RLE to an object; box and area are the file's if it has them."""
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        rle = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    if list(rle["size"]) != [height, width]:
        raise LabelStoreError(f"an object of size {rle['size']} in an image of {[height, width]}")
    left, top, box_width, box_height = entry.get("bbox") or coco.toBbox(rle).tolist()
    return GroundTruthObject(
        category=category,
        bbox=(left, top, box_width, box_height),
        area=float(entry.get("area") or coco.area(rle)),
        is_crowd=bool(entry.get("iscrowd", 0)),
        rle=rle,
    )
