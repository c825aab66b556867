"""Panoptic labels: merging masks and stuff into one map, and storing the maps in chunks of photos.

The folder of a chunk is named after a hash of everything that its labels depend on. A chunk is complete or absent.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int32

from model.errors import DatasetError
from model.files import atomic_directory
from model.formats.coco import encode_label_map, encode_mask
from model.formats.image_files import encode_panoptic_png
from training.data.photos import PhotoFile

CHUNK_SIZE = 64
"""Photos per chunk: what a killed run may lose, a few seconds of work."""
_RECORD_FILE = "chunk.json"
_HASH_DIGITS = 16
_MAX_COVERED = 0.7

Dependencies = Mapping[str, Any]
"""What labels depend on besides the photos, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class PanopticLabel:
    """Segment ids per pixel (0 is void) and the category of each segment, things first."""

    label_map: Int32[np.ndarray, "H W"]
    categories: dict[int, int]


def merge_panoptic(
    masks: Bool[np.ndarray, "N H W"],
    things: list[int],
    stuff: Int32[np.ndarray, "H W"],
    thing_clusters: int,
) -> PanopticLabel:
    """Paint masks over stuff; categories are things 1..K and stuff K+1..K+S.

    U2Seg, equation 5 and its generate_pseudo_panoptic.py: masks are painted by descending box area, so that small
    objects lie on top of large ones. A stuff cluster that things cover by more than 70 % is left void, else its free
    part is one segment. `things` are the clusters of the masks, counted from 1, as in `stuff`, where 0 means none.
    """
    label_map = np.zeros(stuff.shape, np.int32)
    categories: dict[int, int] = {}
    boxes = [cv2.boundingRect(mask.view(np.uint8)) for mask in masks]
    by_size = np.argsort([-width * height for _, _, width, height in boxes], kind="stable")
    for segment_id, index in enumerate(by_size, start=1):
        label_map[masks[index]] = segment_id
        categories[segment_id] = things[index]
    for hidden in set(categories) - set(np.unique(label_map).tolist()):
        del categories[hidden]
    is_covered = label_map > 0
    for label in np.unique(stuff):
        region = stuff == label
        free = region & ~is_covered
        if not label or not free.any() or 1.0 - free.sum() / region.sum() > _MAX_COVERED:
            continue
        segment_id = len(masks) + int(label)
        label_map[free] = segment_id
        categories[segment_id] = thing_clusters + int(label)
    return PanopticLabel(label_map=label_map, categories=categories)


def remove_overlaps(masks: Bool[np.ndarray, "N H W"]) -> Bool[np.ndarray, "N H W"]:
    """Give each pixel to the first mask that has it; a mask that loses more than half of itself becomes empty."""
    taken = np.zeros(masks.shape[1:], bool)
    disjoint = np.zeros_like(masks)
    for index, mask in enumerate(masks):
        free = mask & ~taken
        if 2 * free.sum() >= mask.sum():
            disjoint[index] = free
            taken |= free
    return disjoint


@dataclass(frozen=True, kw_only=True)
class ImageLabel:
    """The label of one image and the masks that it was merged from."""

    panoptic: PanopticLabel
    masks: Bool[np.ndarray, "N H W"]
    """May overlap."""
    things: list[int]
    """The thing cluster of each mask, counted from 1."""
    scores: list[float] | None
    """The score of each mask, if its source gives scores."""
    is_in_panoptic: list[bool] | None = None
    """Whether each mask has a segment in the panoptic map; None if all have."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What a complete chunk stores about one photo, in COCO's terms but for the image id."""

    photo: PhotoFile
    file_name: str
    """The panoptic PNG, relative to the folder of chunks."""
    segments: list[dict[str, Any]]
    instances: list[dict[str, Any]]

    def count_things(self, thing_clusters: int) -> int:
        """Return the number of things in the panoptic map."""
        return sum(segment["category_id"] <= thing_clusters for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A group of photos; its name is a hash of them and of everything that their labels depend on."""

    name: str
    photos: tuple[PhotoFile, ...]

    def is_complete(self, folder: Path) -> bool:
        return (folder / self.name / _RECORD_FILE).is_file()

    def write(self, folder: Path, labels: Iterator[ImageLabel]) -> None:
        """Write `folder/NAME` with one PNG per photo and the record; `labels` are in the order of the photos."""
        with atomic_directory(folder / self.name) as sibling:
            entries = []
            for photo, label in zip(self.photos, labels, strict=True):
                path = sibling / _png_name(photo)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_panoptic_png(label.panoptic.label_map))
                segments, instances = _to_segments_info(label.panoptic), _to_coco_annotations(label)
                entries.append({"segments": segments, "instances": instances})
            (sibling / _RECORD_FILE).write_text(json.dumps(entries))

    def read(self, folder: Path) -> Iterator[ImageRecord]:
        """Raises DatasetError if the chunk is missing or damaged."""
        path = folder / self.name / _RECORD_FILE
        try:
            for photo, entry in zip(self.photos, json.loads(path.read_bytes()), strict=True):
                yield ImageRecord(photo=photo, file_name=f"{self.name}/{_png_name(photo)}", **entry)
        except (OSError, ValueError, TypeError) as error:
            raise DatasetError(
                f"{path} is not a valid chunk record ({error}): delete its folder and run again"
            ) from error


def split_into_chunks(photos: Sequence[PhotoFile]) -> list[tuple[PhotoFile, ...]]:
    """Return the photos of each chunk, in order."""
    return [tuple(photos[start : start + CHUNK_SIZE]) for start in range(0, len(photos), CHUNK_SIZE)]


def make_chunk(photos: Sequence[PhotoFile], dependencies: Dependencies) -> Chunk:
    """Name a chunk after its photos and dependencies."""
    content = {"made_from": dependencies, "photos": [(each.name, each.digest) for each in photos]}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]
    return Chunk(name=name, photos=tuple(photos))


def plan_chunks(photos: Sequence[PhotoFile], dependencies: Dependencies) -> list[Chunk]:
    """Return the chunks of photos in order."""
    return [make_chunk(group, dependencies) for group in split_into_chunks(photos)]


def remove_stale(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Delete what killed runs left in the folder, and chunks that are not among these."""
    kept = {chunk.name for chunk in chunks}
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry)


def _png_name(photo: PhotoFile) -> str:
    return f"{photo.name}.png"


def _to_segments_info(label: PanopticLabel) -> list[dict[str, Any]]:
    rles = encode_label_map(label.label_map, list(label.categories))
    return [
        {"id": segment_id, "category_id": category, "area": rle.area, "bbox": list(rle.bbox), "iscrowd": 0}
        for (segment_id, category), rle in zip(label.categories.items(), rles, strict=True)
    ]


def _to_coco_annotations(label: ImageLabel) -> list[dict[str, Any]]:
    entries = []
    for index, (mask, cluster) in enumerate(zip(label.masks, label.things, strict=True)):
        rle = encode_mask(mask, 0, 0, mask.shape)
        entry: dict[str, Any] = {
            "category_id": cluster,
            "segmentation": {"size": list(rle.size), "counts": rle.counts},
            "area": rle.area,
            "bbox": list(rle.bbox),
            "iscrowd": 0,
        }
        if label.scores is not None:
            entry["score"] = label.scores[index]
        if label.is_in_panoptic is not None:
            entry["in_panoptic"] = int(label.is_in_panoptic[index])
        entries.append(entry)
    return entries
