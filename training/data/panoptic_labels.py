"""Things over stuff: the panoptic pseudo-label."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32
from pycocotools import mask as coco

from model.errors import LabelStoreError
from model.files import atomic_directory
from model.formats.encoders import encode_panoptic_png
from training.choices import StuffMergeRule
from training.data.photos import PhotoFile

_MAX_COVERED = 0.7


@dataclass(frozen=True, kw_only=True)
class PanopticLabel:
    """A pseudo-label: segment ids per pixel (0 is void) and the category of each, things first."""

    label_map: Int32[np.ndarray, "H W"]
    categories: dict[int, int]


def merge_panoptic(
    masks: Bool[np.ndarray, "N H W"],
    things: list[int],
    stuff: Int32[np.ndarray, "H W"],
    thing_clusters: int,
    thing_like: frozenset[int] = frozenset(),
) -> PanopticLabel:
    """Masks painted over stuff, both as categories: things 1..K, stuff K+1..K+S.

    U2Seg, equation 5 and its generate_pseudo_panoptic.py: masks by descending box area, so that small objects come to
    lie on large ones; a stuff cluster more than 70 % covered by things is left void, else its free part is one segment.
    `things` are the masks' clusters, counted from 1, as `stuff` is; stuff 0 is none. The public rule teaches an object
    that no mask found as stuff; the improved one leaves void what is in no mask of the stuff clusters in `thing_like`.
    """
    label_map = np.zeros(stuff.shape, np.int32)
    categories: dict[int, int] = {}
    by_size = np.argsort([-_box_area(mask) for mask in masks], kind="stable")
    for segment_id, index in enumerate(by_size, start=1):
        label_map[masks[index]] = segment_id
        categories[segment_id] = things[index]
    for hidden in set(categories) - set(np.unique(label_map).tolist()):
        del categories[hidden]
    is_covered = label_map > 0
    for label in np.unique(stuff):
        region = stuff == label
        free = region & ~is_covered
        if not label or int(label) in thing_like or not free.any() or 1.0 - free.sum() / region.sum() > _MAX_COVERED:
            continue
        segment_id = len(masks) + int(label)
        label_map[free] = segment_id
        categories[segment_id] = thing_clusters + int(label)
    return PanopticLabel(label_map=label_map, categories=categories)


def find_thing_like_stuff(
    inside: Float[np.ndarray, "S"], max_stuff_in_things: float, rule: StuffMergeRule
) -> frozenset[int]:
    """Stuff clusters, counted from 1, that the rule takes for things: more than `max_stuff_in_things` of them lies
    in masks."""
    clusters = np.flatnonzero(inside > max_stuff_in_things) + 1
    return frozenset(clusters.tolist()) if rule == "improved" else frozenset()


def _box_area(mask: Bool[np.ndarray, "H W"]) -> int:
    _, _, width, height = cv2.boundingRect(mask.view(np.uint8))
    return int(width * height)


CHUNK_SIZE = 64
"""What a killed run may lose: some seconds of work."""
_RECORD_FILE = "shard.json"
_HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class ImageLabel:
    """A photo's pseudo-label and the masks it was merged from."""

    panoptic: PanopticLabel
    masks: Bool[np.ndarray, "N H W"]
    """They may overlap."""
    things: list[int]
    """The masks' clusters, counted from 1."""
    scores: list[float] | None
    """The masks', if whatever found them was more or less sure."""
    is_in_panoptic: list[bool] | None = None
    """Whether a mask has a segment in the label, if some have none: they are less sure, or parts of another."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What a finished shard says of one photo, in COCO's words but for the photo's number."""

    photo: PhotoFile
    file_name: str
    """Of the panoptic PNG, inside the folder of shards."""
    segments: list[dict[str, Any]]
    instances: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some photos and the hash of everything that their labels depend on."""

    name: str
    photos: tuple[PhotoFile, ...]

    def is_complete(self, folder: Path) -> bool:
        return (folder / self.name / _RECORD_FILE).is_file()

    def write(self, folder: Path, labels: Iterator[ImageLabel]) -> None:
        """`folder/NAME` with a PNG a photo and the record; `labels` in the order of the photos."""
        with atomic_directory(folder / self.name) as sibling:
            entries = []
            for photo, label in zip(self.photos, labels, strict=True):
                path = sibling / _png_name(photo)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_panoptic_png(label.panoptic.label_map))
                entries.append(
                    {"segments": _to_segments_info(label.panoptic), "instances": _to_coco_annotations(label)}
                )
            (sibling / _RECORD_FILE).write_text(json.dumps(entries))

    def read(self, folder: Path) -> Iterator[ImageRecord]:
        """Raises LabelStoreError if the shard is missing or is not what was written."""
        path = folder / self.name / _RECORD_FILE
        try:
            for photo, entry in zip(self.photos, json.loads(path.read_bytes()), strict=True):
                yield ImageRecord(photo=photo, file_name=f"{self.name}/{_png_name(photo)}", **entry)
        except (OSError, ValueError, TypeError) as error:
            raise LabelStoreError(f"{path} is no record of a shard ({error}): delete its folder and rerun") from error


@dataclass(frozen=True, kw_only=True)
class ImageRecords:
    """The records of finished shards, read anew each time they are gone through."""

    folder: Path
    shards: Sequence[Chunk]

    def __iter__(self) -> Iterator[ImageRecord]:
        for shard in self.shards:
            yield from shard.read(self.folder)


def split_into_chunks(photos: Sequence[PhotoFile]) -> list[tuple[PhotoFile, ...]]:
    """The photos of each shard, in their order."""
    return [tuple(photos[start : start + CHUNK_SIZE]) for start in range(0, len(photos), CHUNK_SIZE)]


def make_chunk(
    photos: Sequence[PhotoFile],
    made_from: Mapping[str, str | int | float],
    hash_map: Callable[[PhotoFile], str] = lambda photo: "",
) -> Chunk:
    """Its name is the hash of its photos, their maps and of `made_from`."""
    content = {"made_from": made_from, "photos": [(each.name, each.digest, hash_map(each)) for each in photos]}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]
    return Chunk(name=name, photos=tuple(photos))


def plan_chunks(photos: Sequence[PhotoFile], made_from: Mapping[str, str | int | float]) -> list[Chunk]:
    """The shards of photos in their order."""
    return [make_chunk(group, made_from) for group in split_into_chunks(photos)]


def remove_stale(folder: Path, shards: Sequence[Chunk]) -> None:
    """Delete what killed runs left behind, and shards that are none of these."""
    kept = {shard.name for shard in shards}
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry)


def _png_name(photo: PhotoFile) -> str:
    return f"{photo.name}.png"


def _to_segments_info(panoptic: PanopticLabel) -> list[dict[str, Any]]:
    entries = []
    for segment_id, category in panoptic.categories.items():
        mask = panoptic.label_map == segment_id
        bbox = list(cv2.boundingRect(mask.view(np.uint8)))
        entries.append({"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": bbox, "iscrowd": 0})
    return entries


def _to_coco_annotations(label: ImageLabel) -> list[dict[str, Any]]:
    entries = []
    for index, (mask, cluster) in enumerate(zip(label.masks, label.things, strict=True)):
        rle = coco.encode(np.asfortranarray(mask.view(np.uint8)))
        entry: dict[str, Any] = {
            "category_id": cluster,
            "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
            "area": int(mask.sum()),
            "bbox": list(cv2.boundingRect(mask.view(np.uint8))),
            "iscrowd": 0,
        }
        if label.scores is not None:
            entry["score"] = label.scores[index]
        if label.is_in_panoptic is not None:
            entry["painted"] = int(label.is_in_panoptic[index])
        entries.append(entry)
    return entries
