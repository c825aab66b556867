"""Reads COCO JSON files, and checks every image, category and annotation before any work."""

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as coco

from model.errors import DatasetError, InvalidImage
from model.formats.coco import parse_counts
from model.images import read_image_size
from model.progress import track
from training.evaluation.datasets.ground_truth import GroundTruthObject

COCO_FILES = (
    "panoptic.json", "instances.json",
    "annotations/panoptic_{split}.json", "annotations/instances_{split}.json",
    "{split}/_annotations.coco.json", "_annotations.coco.json",
    "result.json", "labels.json",
)  # fmt: skip
"""Where a folder has its COCO file, in order: our own, COCO and CVAT, Roboflow, Label Studio, FiftyOne."""
DEFAULT_SPLITS = ("val2017", "val", "valid", "default", "test", "train2017", "train")
"""Tried in this order; CVAT calls its only split `default`."""
_PHOTO_FOLDERS = (".", "images", "data", "../{split}", "../images/{split}", "../images", "../data", "..")
"""Folders of the photos, relative to the JSON file."""
PNG_FOLDERS = ("{stem}", "panoptic", "../panoptic/{split}", "../panoptic", ".")
_LOCAL_STORAGE = "/data/local-files/?d="
_PROBED_FILES = 20
_MIN_POLYGON_VALUES = 6
"""Three points."""
_Size = tuple[int, int]


class CocoImage(NamedTuple):
    """An image of a COCO file."""

    path: Path
    size: _Size
    """Height, width: as listed, else those of the photo."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was left out of a file or repaired, as most tools for COCO do without a word."""

    entries: dict[str, list[str]] = field(default_factory=dict)
    """What it was called in the file, by reason."""

    def add(self, reason: str, where: str) -> None:
        self.entries.setdefault(reason, []).append(where)

    def describe(self) -> tuple[str, ...]:
        """One line for each reason."""
        return tuple(f"{len(found)} {reason}; the first: {found[0]}" for reason, found in self.entries.items())


def find_coco_file(source: Path, split: str | None) -> Path:
    """Return `source` if it is a file, else the first of COCO_FILES in that folder.

    Raises DatasetError, naming them, if there is none.
    """
    if source.is_file():
        return source
    names = [name for name in COCO_FILES if "{split}" in name or not split]
    for each in [split] if split else DEFAULT_SPLITS:
        for name in names:
            if (path := source / name.format(split=each)).is_file():
                return path
    kind = "contains none of" if source.is_dir() else "does not exist: expected a JSON file, or a folder with one of"
    expected = ", ".join(name.format(split=split or "SPLIT") for name in names)
    raise DatasetError(f"{source} {kind} {expected}; --format names other layouts")


def read_coco_json(path: Path) -> dict[str, Any]:
    """Read a file with COCO's three lists. Raises DatasetError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DatasetError(f"{path} is not a COCO file: it has no list {name!r}")
    coco_lists: dict[str, Any] = content
    return coco_lists


def check_categories(path: Path, content: Mapping[str, Any], *, is_panoptic: bool) -> list[dict[str, Any]]:
    """Return the categories. Raises DatasetError if one is incomplete or listed twice."""
    seen: dict[int, dict[str, Any]] = {}
    for position, category in enumerate(content["categories"]):
        with _errors_in(path, f"categories[{position}]"):
            number, name = category.get("id"), category.get("name")
            if not _is_integer(number) or not isinstance(name, str) or not name:
                raise ValueError(f"expected an integer id and a name, got {number!r} and {name!r}")
            if seen.setdefault(number, category) != category:
                raise ValueError(f"the id {number} is listed twice")
            if is_panoptic and category.get("isthing") not in (0, 1):
                raise ValueError(f"{name!r} needs isthing, 0 or 1, in COCO's panoptic format")
    return list(seen.values())


def read_images(path: Path, content: Mapping[str, Any], left_out: LeftOut) -> dict[int, CocoImage]:
    """Return the images by id; finds their folder next to the file.

    Raises DatasetError if one is incomplete, if two have one id or file, or if no photo is found.
    """
    names: dict[int, str] = {}
    sizes: dict[int, _Size | None] = {}
    for position, image in enumerate(content["images"]):
        number, name = image.get("id"), image.get("file_name")
        with _errors_in(path, f"images[{position}]"):
            if not _is_integer(number) or not isinstance(name, str) or not name:
                raise ValueError(f"expected an integer id and a file_name, got {number!r} and {name!r}")
            name = _to_path(name)
            if number in names:
                if names[number] != name:
                    raise ValueError(f"the id {number} is also that of {names[number]}")
                left_out.add("images listed twice", f"image {number}")
                continue
            names[number] = name
            sizes[number] = _declared_size(image)
    repeated = len(names) - len(set(names.values()))
    if repeated:
        raise DatasetError(f"{path} lists {repeated} photos under several ids: merge them")
    folder = find_folder(path, _PHOTO_FOLDERS, list(names.values()))
    images = {}
    for number, name in names.items():
        try:
            images[number] = CocoImage(folder / name, sizes[number] or read_image_size(folder / name))
        except InvalidImage as error:
            raise DatasetError(f"{path}: image {number} has no height and width, and {error}") from error
    return images


def _to_path(file_name: str) -> str:
    """Return the path in a `file_name` as Windows or Label Studio (with local storage) writes it."""
    path = file_name.replace("\\", "/")
    return unquote(path.removeprefix(_LOCAL_STORAGE)) if path.startswith(_LOCAL_STORAGE) else path


def find_folder(path: Path, candidates: Iterable[str], names: list[str]) -> Path:
    """Return the folder, of those relative to the JSON file, that has the most of the first files.

    Raises DatasetError if no file is there.
    """
    split = re.sub(r"^(panoptic|instances|person_keypoints)_", "", path.stem)
    folders = [path.parent / each.format(split=split, stem=path.stem) for each in candidates]
    counts = [sum((folder / name).is_file() for name in names[:_PROBED_FILES]) for folder in folders]
    if names and not max(counts):
        looked = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
        raise DatasetError(f"{path}: {names[0]} is in none of {looked}")
    return folders[counts.index(max(counts))]


def read_objects(
    path: Path,
    annotations: list[dict[str, Any]],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, int],
    left_out: LeftOut,
) -> dict[int, list[GroundTruthObject]]:
    """Return the objects of each image; `categories` has the index of each listed category.

    Raises DatasetError, naming the annotation, if it is invalid; what has no mask is added to `left_out` if others
    have one.
    """
    objects: dict[int, list[tuple[str, GroundTruthObject]]] = {number: [] for number in images}
    seen: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(track(annotations, "check annotations", unit="annotation")):
        where = f"annotation {entry['id']}" if "id" in entry else f"annotations[{position}]"
        image: Any = entry.get("image_id")
        category: Any = entry.get("category_id")
        with _errors_in(path, f"{where} of image {image}"):
            if "id" in entry and seen.setdefault(str(entry["id"]), entry) is not entry:
                if seen[str(entry["id"])] != entry:
                    raise ValueError("another annotation has the same id")
                left_out.add("annotations listed twice", where)
                continue
            if category not in categories:
                raise ValueError(f"category {category} is not listed")
            if image not in images:
                left_out.add("annotations of images that are not listed", where)
                continue
            found = _read_object(entry, categories[category], images[image].size, where, left_out)
            if found is not None:
                objects[image].append((where, found))
    has_masks = any(each.rle is not None for found in objects.values() for _, each in found)
    if annotations and not any(objects.values()):
        raise DatasetError(f"{path} has no usable annotation: {'; '.join(left_out.describe())}")
    for where in (where for found in objects.values() for where, each in found if has_masks and each.rle is None):
        left_out.add("annotations without a mask", where)
    return {
        number: [each for _, each in found if not has_masks or each.rle is not None]
        for number, found in objects.items()
    }


def read_panoptic_entries(
    path: Path,
    annotations: list[dict[str, Any]],
    images: Mapping[int, CocoImage],
    categories: Container[int],
    left_out: LeftOut,
) -> dict[int, dict[str, Any]]:
    """Return the annotation of each image in COCO's panoptic format. Raises DatasetError if one is invalid."""
    found: dict[int, dict[str, Any]] = {}
    for entry in annotations:
        number: Any = entry.get("image_id")
        with _errors_in(path, f"annotation of image {number}"):
            segments, name = entry.get("segments_info"), entry.get("file_name")
            if not isinstance(segments, list) or not isinstance(name, str):
                raise ValueError("it has no segments_info and file_name, as COCO's panoptic format has")
            if number not in images:
                left_out.add("annotations of images that are not listed", f"annotation of image {number}")
                continue
            if found.setdefault(number, entry) != entry:
                raise ValueError("the image has another annotation")
            ids = [each.get("id") for each in segments if isinstance(each, dict)]
            if len(ids) < len(segments) or not all(map(_is_integer, ids)) or len(set(ids)) < len(ids):
                raise ValueError("its segments need different integer ids")
            for each in segments:
                if each.get("category_id") not in categories:
                    raise ValueError(f"category {each.get('category_id')} of segment {each['id']} is not listed")
    return found


def _read_object(
    entry: dict[str, Any], category: int, size: _Size, where: str, left_out: LeftOut
) -> GroundTruthObject | None:
    """Return the object, without a mask if only its box is labeled; box and area are the file's if it has them."""
    rle = _read_mask(entry.get("segmentation"), size, where, left_out)
    if rle is not None and not coco.area(rle):
        left_out.add("annotations with an empty mask", where)
        return None
    bbox = entry.get("bbox") or []
    if not isinstance(bbox, list) or len(bbox) not in (0, 4) or not all(map(_is_finite, bbox)):
        raise ValueError(f"bbox {bbox} is not [x, y, width, height]")
    is_box = bool(bbox) and min(bbox[2:]) > 0
    if rle is None and not is_box:
        left_out.add("annotations without a mask or a box", where)
        return None
    left, top, width, height = bbox if is_box else coco.toBbox(rle).tolist()
    area = entry.get("area") or 0
    if not _is_finite(area):
        raise ValueError(f"area {area} is not a finite number")
    return GroundTruthObject(
        category=category,
        bbox=(left, top, width, height),
        area=float(area) if area > 0 else float(width * height if rle is None else coco.area(rle)),
        is_crowd=bool(entry.get("iscrowd")),
        rle=rle,
    )


def _read_mask(segmentation: Any, size: _Size, where: str, left_out: LeftOut) -> dict[str, Any] | None:
    """Return a mask of polygons, of uncompressed or of compressed RLE; None if there is none."""
    if segmentation in (None, [], [[]], {}):
        return None
    height, width = size
    match segmentation:
        case {"counts": list() | str() as counts, "size": [*given]}:
            if list(given) != [height, width]:
                raise ValueError(f"its mask has the size {given}, the image {[height, width]}")
            runs = parse_counts(counts) if isinstance(counts, str) else np.array(counts)
            if runs.dtype.kind not in "iu" or runs.ndim != 1 or (runs < 0).any() or int(runs.sum()) != height * width:
                raise ValueError(f"the runs of its RLE do not add up to {height} x {width} pixels")
            rle: dict[str, Any] = segmentation
            return rle if isinstance(counts, str) else dict(coco.frPyObjects(segmentation, height, width))
        case list() if all(isinstance(polygon, list) for polygon in segmentation):
            polygons = [np.asarray(polygon, dtype=float) for polygon in segmentation]
        case _:
            raise ValueError("its segmentation is neither a list of polygons nor an RLE")
    kept = [each for each in polygons if each.ndim == 1 and len(each) >= _MIN_POLYGON_VALUES and len(each) % 2 == 0]
    if len(kept) < len(polygons):
        left_out.add("annotations with polygons of fewer than three points", where)
    for polygon in kept:
        xs, ys = polygon[::2], polygon[1::2]
        if not np.isfinite(polygon).all() or max(abs(xs).max() / width, abs(ys).max() / height) > 2.0:
            raise ValueError(f"its polygon lies outside the image of {width}x{height} pixels, or is not finite")
        if min(xs.min(), ys.min()) < -1 or xs.max() > width + 1 or ys.max() > height + 1:
            left_out.add("annotations cut at the border of the image", where)
    if not kept:
        return None
    merged: dict[str, Any] = coco.merge(coco.frPyObjects([each.tolist() for each in kept], height, width))
    return merged


def _declared_size(image: Mapping[str, Any]) -> _Size | None:
    height, width = image.get("height"), image.get("width")
    if height is None and width is None:
        return None
    if not (_is_integer(height) and _is_integer(width)) or min(height, width) < 1:
        raise ValueError(f"height {height!r} and width {width!r} are not positive integers")
    return height, width


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def _errors_in(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise DatasetError(f"{path}: {where}: {error}") from error
