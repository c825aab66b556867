"""COCO, COCO-Stuff and UVO as they are published."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from model.errors import LabelStoreError
from training.choices import ClassGrouping
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
from training.evaluation.datasets.taxonomy import COCO_STUFF_27, Taxonomy, build_thing_taxonomy

_STUFF_CROP_PX = 320


@dataclass(frozen=True, kw_only=True)
class CocoInstanceAnnotation:
    """Objects of a COCO instance file, which may overlap."""

    entries: tuple[dict[str, Any], ...]
    index: dict[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def read(self, height: int, width: int) -> GroundTruthLabels:
        objects = tuple(_read_object(each, self.index[each["category_id"]], height, width) for each in self.entries)
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=objects)


@dataclass(frozen=True, kw_only=True)
class ClassPngAnnotation:
    """A class for every pixel."""

    path: Path
    index: dict[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Segments are numbered from 1, one a class."""
        plane = read_label_png(self.path)
        require_size(self.path, plane, height, width)
        table = np.zeros(max(int(plane.max()) + 1, 256), np.int32)
        for value, place in self.index.items():
            table[value] = place + 1
        label_map = table[plane]
        segments = {int(each): int(each) - 1 for each in np.unique(label_map) if each}
        return GroundTruthLabels(label_map=label_map, segments=segments, crowds=frozenset(), objects=())


def read_coco_panoptic(folder: Path, split: str, protocol: ClassGrouping) -> GroundTruthDataset:
    """`annotations/panoptic_SPLIT.json`, `annotations/panoptic_SPLIT/*.png`, `SPLIT/*.jpg`."""
    index = folder / "annotations" / f"panoptic_{split}.json"
    return read_panoptic_dataset(folder, index, folder / split, index.with_suffix(""), protocol)


def read_coco_instances(folder: Path, split: str) -> GroundTruthDataset:
    """`annotations/instances_SPLIT.json`, `SPLIT/*.jpg`; pictures without an object count."""
    return read_instances(folder, folder / "annotations" / f"instances_{split}.json", folder / split)


def read_uvo_frames(folder: Path, split: str) -> GroundTruthDataset:
    """`FrameSet/UVO_frame_SPLIT.json`, `uvo_videos_sparse_frames/VIDEO/*.png`; "other" is left out."""
    index = folder / "FrameSet" / f"UVO_frame_{split}.json"
    return read_instances(folder, index, folder / "uvo_videos_sparse_frames", without=("other",))


def read_instances(folder: Path, index: Path, photos: Path, *, without: tuple[str, ...] = ()) -> GroundTruthDataset:
    """A set in COCO's instance format. Raises LabelStoreError if something is missing or does not fit together."""
    try:
        content = json.loads(index.read_bytes())
        images = [(each["id"], photos / each["file_name"]) for each in content["images"]]
        taxonomy = build_thing_taxonomy(content["categories"], without=without)
        listed = {each["id"] for each in content["categories"]}
        entries: dict[int, list[dict[str, Any]]] = {number: [] for number, _ in images}
        for each in content["annotations"]:
            if each["category_id"] not in listed:
                raise ValueError(f"category {each['category_id']} is not listed")
            entries[each["image_id"]].append(each)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is no labelled set in COCO's instance format: {error!r}") from error
    return _list_objects(folder, index.stem, taxonomy, images, entries)


def read_uvo_videos(folder: Path, split: str) -> GroundTruthDataset:
    """`VideoDenseSet/UVO_video_SPLIT_dense.json`, `uvo_videos_dense_frames/VIDEO/*.png`: each frame is a picture."""
    index = folder / "VideoDenseSet" / f"UVO_video_{split}_dense.json"
    frames = folder / "uvo_videos_dense_frames"
    try:
        content = json.loads(index.read_bytes())
        numbers = {}
        images: list[tuple[int, Path]] = []
        for video in content["videos"]:
            for place, name in enumerate(video["file_names"]):
                numbers[video["id"], place] = len(images) + 1
                images.append((len(images) + 1, frames / name))
        taxonomy = build_thing_taxonomy(content["categories"], without=("other",))
        entries: dict[int, list[dict[str, Any]]] = {number: [] for number, _ in images}
        for each in content["annotations"]:
            for place, segmentation in enumerate(each["segmentations"]):
                if segmentation:
                    entry = {"category_id": each["category_id"], "segmentation": segmentation}
                    entries[numbers[each["video_id"], place]].append({**entry, "iscrowd": each.get("iscrowd", 0)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is no UVO video set: {error!r}") from error
    return _list_objects(folder, index.stem, taxonomy, images, entries)


def read_coco_stuff(folder: Path, split: str) -> GroundTruthDataset:
    """`images/SPLIT/*.jpg`, `annotations/SPLIT/*.png` of COCO-Stuff-164k in the 27 classes of PiCIE and STEGO.

    Scored, as there, on the central 320-pixel square of the picture scaled to a short side of 320. Unlike there the
    network sees the whole picture; and all pictures count, for a curated list leave only its labels in the folder.
    """
    labels = sorted((folder / "annotations" / split).glob("*.png"))
    pictures = tuple(
        GroundTruthImage(
            image_id=number,
            path=folder / "images" / split / f"{label.stem}.jpg",
            annotation=ClassPngAnnotation(path=label, index=COCO_STUFF_27.index),
        )
        for number, label in enumerate(labels, start=1)
    )
    name = f"{folder.resolve().name}, {split}, centre crop of {_STUFF_CROP_PX} px"
    truth = GroundTruthDataset(
        name=name, kind="semantic", taxonomy=COCO_STUFF_27, images=pictures, crop_px=_STUFF_CROP_PX
    )
    require_files(folder, truth)
    return truth


def _list_objects(
    folder: Path,
    name: str,
    taxonomy: Taxonomy,
    images: Iterable[tuple[int, Path]],
    entries: dict[int, list[dict[str, Any]]],
) -> GroundTruthDataset:
    pictures = []
    for number, path in sorted(images):
        kept = tuple(each for each in entries[number] if each["category_id"] in taxonomy.index)
        pictures.append(
            GroundTruthImage(
                image_id=number, path=path, annotation=CocoInstanceAnnotation(entries=kept, index=taxonomy.index)
            )
        )
    truth = GroundTruthDataset(
        name=f"{folder.resolve().name}, {name}", kind="masks", taxonomy=taxonomy, images=tuple(pictures)
    )
    require_files(folder, truth)
    return truth


def _read_object(entry: dict[str, Any], category: int, height: int, width: int) -> GroundTruthObject:
    """Polygons, RLE as counts or as compressed text, to one RLE; box and area are the file's where it has them."""
    shape = entry["segmentation"]
    if isinstance(shape, list):
        rle = coco.merge(coco.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        rle = coco.frPyObjects(shape, height, width)
    else:
        rle = shape
    if list(rle["size"]) != [height, width]:
        raise LabelStoreError(f"an object of size {rle['size']} in a picture of {[height, width]}")
    left, top, box_width, box_height = entry.get("bbox") or coco.toBbox(rle).tolist()
    return GroundTruthObject(
        category=category,
        bbox=(left, top, box_width, box_height),
        area=float(entry.get("area") or coco.area(rle)),
        is_crowd=bool(entry.get("iscrowd", 0)),
        rle=rle,
    )
