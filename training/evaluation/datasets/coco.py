"""Datasets in COCO's panoptic and instance formats; every image, category and annotation is checked before any work."""

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as coco
from pydantic import Field, PositiveInt, StrictInt, StrictStr, TypeAdapter, ValidationError

from model.errors import ConfigError, DatasetError
from model.formats.coco import parse_counts
from model.images import read_image_size
from model.progress import track
from training.evaluation.datasets.ground_truth import (
    Annotation,
    AnnotationKind,
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthObject,
    ObjectAnnotation,
    PanopticAnnotation,
    check_files,
)
from training.evaluation.datasets.taxonomy import (
    ClassGrouping,
    CocoCategory,
    Taxonomy,
    build_taxonomy,
    build_thing_taxonomy,
)

logger = logging.getLogger(__name__)

CocoKind = Literal["panoptic", "instances"]
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
_PNG_FOLDERS = ("{stem}", "panoptic", "../panoptic/{split}", "../panoptic", ".")
_LOCAL_STORAGE = "/data/local-files/?d="
_PROBED_FILES = 20
_MIN_POLYGON_VALUES = 6
"""Three points."""
_Size = tuple[int, int]
"""Height, width."""
_LeftOut = defaultdict[str, list[str]]
"""What was left out of a file or repaired, as most tools for COCO do without a word: its names in it, by reason."""
_Images = Mapping[int, tuple[Path, _Size]]
"""Path of each listed image, and its size: as listed, else that of the photo."""


@dataclass(frozen=True, kw_only=True)
class _ListedImage:
    """An image as the file lists it."""

    id: StrictInt
    file_name: Annotated[StrictStr, Field(min_length=1)]
    height: PositiveInt | None = None
    width: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """An entry of `segments_info`."""

    id: StrictInt
    category_id: StrictInt
    iscrowd: bool = False


@dataclass(frozen=True, kw_only=True)
class _PanopticEntry:
    """An annotation in COCO's panoptic format."""

    image_id: StrictInt
    file_name: StrictStr
    segments_info: list[_Segment]


@dataclass(frozen=True, kw_only=True)
class _CocoFile:
    """COCO's three lists."""

    images: list[_ListedImage]
    categories: list[CocoCategory]
    annotations: list[dict[str, Any]]


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


def read_coco(path: Path, name: str, grouping: ClassGrouping, kind: CocoKind | None = None) -> GroundTruthDataset:
    """Read a file in COCO's panoptic or instance format; None for `kind` finds out which of them it is.

    The photos are found next to the file. A file without any mask has boxes only. Raises DatasetError if something is
    missing, invalid or inconsistent, and ConfigError for a grouping of classes that the format does not have.
    """
    with _errors_in(path, "not a COCO file"):
        content = TypeAdapter(_CocoFile).validate_json(path.read_bytes())
    if kind is None:
        kind = "panoptic" if any("segments_info" in entry for entry in content.annotations) else "instances"
    left_out: _LeftOut = defaultdict(list)
    if repeated := [each for each, count in Counter(each.id for each in content.categories).items() if count > 1]:
        raise DatasetError(f"{path}: the category id {repeated[0]} is listed twice")
    files = _read_images(path, content.images, left_out)
    annotations: Mapping[int, Annotation]
    labeled: AnnotationKind = "panoptic"
    if kind == "panoptic":
        taxonomy = build_taxonomy(content.categories, grouping)
        annotations = _read_panoptic(path, content.annotations, files, taxonomy, left_out)
    elif grouping != "supercategories":
        raise ConfigError(f"{path} has instances, whose classes are fixed, got {grouping!r}")
    else:
        taxonomy = build_thing_taxonomy(content.categories)
        objects = _read_objects(path, content.annotations, files, taxonomy.source_to_index, left_out)
        annotations = {number: ObjectAnnotation(objects=tuple(found)) for number, found in objects.items()}
        labeled = "boxes" if any(found and found[0].rle is None for found in objects.values()) else "masks"
    dataset = GroundTruthDataset(
        name=name,
        kind=labeled,
        taxonomy=taxonomy,
        images=tuple(
            GroundTruthImage(image_id=number, path=files[number][0], size=files[number][1], annotation=annotation)
            for number, annotation in sorted(annotations.items())
        ),
        skipped=_describe(left_out),
    )
    check_files(path, dataset)
    for line in dataset.skipped:
        logger.warning("%s: left out %s", path, line)
    return dataset


def _read_images(path: Path, listed: Iterable[_ListedImage], left_out: _LeftOut) -> _Images:
    """Return the images by id; finds their folder next to the file.

    Raises DatasetError if two have one id or file, or if no photo is found, and InvalidImage if the size of an image is
    neither listed nor readable.
    """
    images: dict[int, _ListedImage] = {}
    for each in listed:
        if each.id in images:
            left_out["images listed twice"].append(f"image {each.id}")
        if images.setdefault(each.id, each) != each:
            raise DatasetError(f"{path}: {images[each.id].file_name} and {each.file_name} both have the id {each.id}")
    names = {number: _to_path(each.file_name) for number, each in images.items()}
    if repeated := len(names) - len(set(names.values())):
        raise DatasetError(f"{path} lists {repeated} photos under several ids: merge them")
    folder = _find_folder(path, _PHOTO_FOLDERS, list(names.values()))
    return {
        number: (
            folder / names[number],
            (each.height, each.width) if each.height and each.width else read_image_size(folder / names[number]),
        )
        for number, each in images.items()
    }


def _to_path(file_name: str) -> str:
    """Return the path in a `file_name` as Windows or Label Studio (with local storage) writes it."""
    path = file_name.replace("\\", "/")
    return unquote(path.removeprefix(_LOCAL_STORAGE)) if path.startswith(_LOCAL_STORAGE) else path


def _find_folder(path: Path, candidates: Iterable[str], names: list[str]) -> Path:
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


def _read_panoptic(
    path: Path,
    annotations: list[dict[str, Any]],
    images: _Images,
    taxonomy: Taxonomy,
    left_out: _LeftOut,
) -> dict[int, PanopticAnnotation]:
    """Return the label of each image in COCO's panoptic format. Raises DatasetError if one is invalid."""
    entries: dict[int, _PanopticEntry] = {}
    with _errors_in(path, "annotations"):
        listed = TypeAdapter(list[_PanopticEntry]).validate_python(annotations)
    for entry in listed:
        with _errors_in(path, f"annotation of image {entry.image_id}"):
            if entry.image_id not in images:
                left_out["annotations of images that are not listed"].append(f"annotation of image {entry.image_id}")
                continue
            if entries.setdefault(entry.image_id, entry) != entry:
                raise ValueError("the image has another annotation")
            if len({each.id for each in entry.segments_info}) < len(entry.segments_info):
                raise ValueError("its segments need different ids")
            for each in entry.segments_info:
                if each.category_id not in taxonomy.source_to_index:
                    raise ValueError(f"category {each.category_id} of segment {each.id} is not listed")
    folder = _find_folder(path, _PNG_FOLDERS, [entry.file_name for entry in entries.values()])
    return {
        number: PanopticAnnotation(
            files=(folder / entry.file_name,),
            segments={each.id: taxonomy.source_to_index[each.category_id] for each in entry.segments_info},
            crowds=frozenset(each.id for each in entry.segments_info if each.iscrowd),
            num_things=taxonomy.num_things,
        )
        for number, entry in entries.items()
    }


def _read_objects(
    path: Path,
    annotations: list[dict[str, Any]],
    images: _Images,
    categories: Mapping[int, int],
    left_out: _LeftOut,
) -> dict[int, list[GroundTruthObject]]:
    """Return the objects of each image; `categories` has the index of each listed category.

    Raises DatasetError, naming the annotation, if it is invalid; what has no mask is added to `left_out` if others
    have one.
    """
    found: list[tuple[int, str, GroundTruthObject]] = []
    seen: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(track(annotations, "check annotations", unit="annotation")):
        where = f"annotation {entry['id']}" if "id" in entry else f"annotations[{position}]"
        image: Any = entry.get("image_id")
        category: Any = entry.get("category_id")
        with _errors_in(path, f"{where} of image {image}"):
            if "id" in entry and seen.setdefault(str(entry["id"]), entry) is not entry:
                if seen[str(entry["id"])] != entry:
                    raise ValueError("another annotation has the same id")
                left_out["annotations listed twice"].append(where)
                continue
            if category not in categories:
                raise ValueError(f"category {category} is not listed")
            if image not in images:
                left_out["annotations of images that are not listed"].append(where)
                continue
            if labeled := _read_object(entry, categories[category], images[image][1], where, left_out):
                found.append((image, where, labeled))
    if annotations and not found:
        raise DatasetError(f"{path} has no usable annotation: {'; '.join(_describe(left_out))}")
    has_masks = any(labeled.rle is not None for _, _, labeled in found)
    objects: dict[int, list[GroundTruthObject]] = {number: [] for number in images}
    for image, where, labeled in found:
        if has_masks and labeled.rle is None:
            left_out["annotations without a mask"].append(where)
        else:
            objects[image].append(labeled)
    return objects


def _read_object(
    entry: dict[str, Any], category: int, size: _Size, where: str, left_out: _LeftOut
) -> GroundTruthObject | None:
    """Return the object, without a mask if only its box is labeled; box and area are the file's if it has them."""
    rle = _read_mask(entry.get("segmentation"), size, where, left_out)
    if rle is not None and not coco.area(rle):
        left_out["annotations with an empty mask"].append(where)
        return None
    bbox = entry.get("bbox") or []
    if not isinstance(bbox, list) or len(bbox) not in (0, 4) or not all(map(_is_finite, bbox)):
        raise ValueError(f"bbox {bbox} is not [x, y, width, height]")
    is_box = bool(bbox) and min(bbox[2:]) > 0
    if rle is None and not is_box:
        left_out["annotations without a mask or a box"].append(where)
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


def _read_mask(segmentation: Any, size: _Size, where: str, left_out: _LeftOut) -> dict[str, Any] | None:
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
        left_out["annotations with polygons of fewer than three points"].append(where)
    for polygon in kept:
        xs, ys = polygon[::2], polygon[1::2]
        if not np.isfinite(polygon).all() or max(abs(xs).max() / width, abs(ys).max() / height) > 2.0:
            raise ValueError(f"its polygon lies outside the image of {width}x{height} pixels, or is not finite")
        if min(xs.min(), ys.min()) < -1 or xs.max() > width + 1 or ys.max() > height + 1:
            left_out["annotations cut at the border of the image"].append(where)
    if not kept:
        return None
    merged: dict[str, Any] = coco.merge(coco.frPyObjects([each.tolist() for each in kept], height, width))
    return merged


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _describe(left_out: _LeftOut) -> tuple[str, ...]:
    return tuple(f"{len(found)} {reason}; the first: {found[0]}" for reason, found in left_out.items())


@contextmanager
def _errors_in(path: Path, where: str) -> Iterator[None]:
    """Raise every error about the content as a DatasetError on one line."""
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DatasetError(f"{path}: {where}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise DatasetError(f"{path}: {where}: {error}") from error
