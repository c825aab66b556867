"""Labels on disk, some photos at a time: a shard is named by what it was made from, and is whole or not there."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco

from model.encodings import encode_panoptic_png
from model.errors import LabelStoreError
from model.files import replace_directory
from training.labels.merge import Labelled
from training.photos import PhotoFile

SHARD_PHOTOS = 64
"""What a killed run may lose: some seconds of work."""
_RECORD_FILE = "shard.json"
_HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class LabelledPhoto:
    """A photo's pseudo-label and the masks it was merged from."""

    labelled: Labelled
    masks: Bool[np.ndarray, "N H W"]
    """They may overlap."""
    things: list[int]
    """The masks' clusters, counted from 1."""
    scores: list[float] | None
    """The masks', if whatever found them was more or less sure."""
    is_painted: list[bool] | None = None
    """Whether a mask has a segment in the label, if some have none: they are less sure, or parts of another."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished shard says of one photo, in COCO's words but for the photo's number."""

    photo: PhotoFile
    file_name: str
    """Of the panoptic PNG, inside the folder of shards."""
    segments: list[dict[str, Any]]
    instances: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some photos and the hash of everything that their labels depend on."""

    name: str
    photos: tuple[PhotoFile, ...]

    def is_whole(self, folder: Path) -> bool:
        return (folder / self.name / _RECORD_FILE).is_file()

    def write(self, folder: Path, labels: Iterator[LabelledPhoto]) -> None:
        """`folder/NAME` with a PNG a photo and the record; `labels` in the order of the photos."""
        with replace_directory(folder / self.name) as sibling:
            entries = []
            for photo, label in zip(self.photos, labels, strict=True):
                path = sibling / _name_png(photo)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_panoptic_png(label.labelled.label_map))
                entries.append({"segments": _describe_segments(label.labelled), "instances": _describe_masks(label)})
            (sibling / _RECORD_FILE).write_text(json.dumps(entries))

    def read(self, folder: Path) -> Iterator[Record]:
        """Raises LabelStoreError if the shard is missing or is not what was written."""
        path = folder / self.name / _RECORD_FILE
        try:
            for photo, entry in zip(self.photos, json.loads(path.read_bytes()), strict=True):
                yield Record(photo=photo, file_name=f"{self.name}/{_name_png(photo)}", **entry)
        except (OSError, ValueError, TypeError) as error:
            raise LabelStoreError(f"{path} is no record of a shard ({error}): delete its folder and rerun") from error


@dataclass(frozen=True, kw_only=True)
class Records:
    """The records of finished shards, read anew each time they are gone through."""

    folder: Path
    shards: Sequence[Shard]

    def __iter__(self) -> Iterator[Record]:
        for shard in self.shards:
            yield from shard.read(self.folder)


def split(photos: Sequence[PhotoFile]) -> list[tuple[PhotoFile, ...]]:
    """The photos of each shard, in their order."""
    return [tuple(photos[start : start + SHARD_PHOTOS]) for start in range(0, len(photos), SHARD_PHOTOS)]


def make_shard(
    photos: Sequence[PhotoFile],
    made_from: Mapping[str, str | int | float],
    hash_map: Callable[[PhotoFile], str] = lambda photo: "",
) -> Shard:
    """Its name is the hash of its photos, their maps and of `made_from`."""
    content = {"made_from": made_from, "photos": [(each.name, each.digest, hash_map(each)) for each in photos]}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]
    return Shard(name=name, photos=tuple(photos))


def plan_shards(photos: Sequence[PhotoFile], made_from: Mapping[str, str | int | float]) -> list[Shard]:
    """The shards of photos in their order."""
    return [make_shard(group, made_from) for group in split(photos)]


def sweep(folder: Path, shards: Sequence[Shard]) -> None:
    """Delete what killed runs left behind, and shards that are none of these."""
    kept = {shard.name for shard in shards}
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry)


def _name_png(photo: PhotoFile) -> str:
    return f"{photo.name}.png"


def _describe_segments(labelled: Labelled) -> list[dict[str, Any]]:
    entries = []
    for segment_id, category in labelled.categories.items():
        mask = labelled.label_map == segment_id
        bbox = list(cv2.boundingRect(mask.view(np.uint8)))
        entries.append({"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": bbox, "iscrowd": 0})
    return entries


def _describe_masks(label: LabelledPhoto) -> list[dict[str, Any]]:
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
        if label.is_painted is not None:
            entry["painted"] = int(label.is_painted[index])
        entries.append(entry)
    return entries
