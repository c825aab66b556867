"""Labeled datasets for evaluation: images, their ground truth, and COCO's panoptic format."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int32
from PIL import Image
from pycocotools import mask as coco

from model.errors import LabelStoreError
from model.images import resize_labels
from training.data.dataset import read_label_map
from training.evaluation.datasets.taxonomy import ClassGrouping, Taxonomy, build_taxonomy

PANOPTIC_INDEX_FILE = "panoptic.json"
AnnotationKind = Literal["panoptic", "semantic", "masks", "boxes"]
"""What is labeled: segments of all pixels, a class for each pixel, objects with masks, or objects with boxes only."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthObject:
    """A labeled object of an image."""

    category: int
    """Category index in the taxonomy."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    area: float
    is_crowd: bool
    """A group of objects, or an object marked as difficult: a missed one is not an error."""
    rle: dict[str, Any] | None
    """Mask as COCO's compressed RLE; None if only the box is labeled."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthLabels:
    """The labels of one image."""

    label_map: Int32[np.ndarray, "H W"] | None
    """Segment ids; ids that are not in `segments` are void. None if only objects are labeled."""
    segments: dict[int, int]
    """Category index by segment id."""
    crowds: frozenset[int]
    objects: tuple[GroundTruthObject, ...]


class Annotation(Protocol):
    """The labels of one image on disk."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that must exist."""
        ...

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Raises LabelStoreError unless the label is valid for an image of this size."""
        ...


@dataclass(frozen=True, kw_only=True)
class GroundTruthImage:
    """One labeled image."""

    image_id: int
    path: Path
    annotation: Annotation


@dataclass(frozen=True, kw_only=True)
class GroundTruthDataset:
    """A labeled dataset."""

    name: str
    """Name of the folder, and the split of a published dataset."""
    kind: AnnotationKind
    taxonomy: Taxonomy
    images: tuple[GroundTruthImage, ...]
    crop_px: int | None = None
    """Semantic metrics are computed on a central square of this side, after scaling the shorter side to it."""


@dataclass(frozen=True, kw_only=True)
class PanopticAnnotation:
    """Segments in COCO's panoptic format."""

    path: Path
    segments: dict[int, int]
    crowds: frozenset[int]
    num_things: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        label_map = read_label_map(self.path)
        require_size(self.path, label_map, height, width)
        return labels_from_segments(label_map, self.segments, self.crowds, self.num_things)


def labels_from_segments(
    label_map: Int32[np.ndarray, "H W"], segments: dict[int, int], crowds: frozenset[int], num_things: int
) -> GroundTruthLabels:
    """Return labels whose objects are the things of the label map that have at least one pixel."""
    objects = []
    for segment, category in segments.items():
        mask = label_map == segment
        if category < num_things and mask.any():
            objects.append(object_from_mask(mask, category, is_crowd=segment in crowds))
    return GroundTruthLabels(label_map=label_map, segments=segments, crowds=crowds, objects=tuple(objects))


def object_from_mask(mask: Bool[np.ndarray, "H W"], category: int, *, is_crowd: bool) -> GroundTruthObject:
    """Return the object with this mask."""
    rle = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    left, top, width, height = coco.toBbox(rle).tolist()
    return GroundTruthObject(
        category=category, bbox=(left, top, width, height), area=float(mask.sum()), is_crowd=is_crowd, rle=rle
    )


def read_panoptic_folder(folder: Path, grouping: ClassGrouping) -> GroundTruthDataset:
    """Read our own layout: `panoptic.json` in COCO's format, photos in `images/`, PNGs in `panoptic/`."""
    index = folder / PANOPTIC_INDEX_FILE
    dataset = read_panoptic_dataset(folder, index, folder / "images", folder / "panoptic", grouping)
    return replace(dataset, name=folder.resolve().name)


def read_panoptic_dataset(
    folder: Path, index: Path, photos: Path, labels: Path, grouping: ClassGrouping
) -> GroundTruthDataset:
    """Read a dataset in COCO's panoptic format.

    Raises LabelStoreError if something is missing or inconsistent.
    """
    try:
        content = json.loads(index.read_bytes())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        taxonomy = build_taxonomy(content["categories"], grouping)
        images = tuple(
            GroundTruthImage(
                image_id=annotation["image_id"],
                path=photos / files[annotation["image_id"]],
                annotation=_parse_annotation(annotation, labels, taxonomy),
            )
            for annotation in sorted(content["annotations"], key=lambda each: int(each["image_id"]))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is not a dataset in COCO's panoptic format: {error!r}") from error
    name = f"{folder.resolve().name}, {index.stem}"
    dataset = GroundTruthDataset(name=name, kind="panoptic", taxonomy=taxonomy, images=images)
    require_files(folder, dataset)
    return dataset


def _parse_annotation(annotation: dict[str, Any], labels: Path, taxonomy: Taxonomy) -> PanopticAnnotation:
    entries = annotation["segments_info"]
    if unknown := {entry["category_id"] for entry in entries} - set(taxonomy.source_to_index):
        raise ValueError(f"categories {sorted(unknown)} are not listed")
    return PanopticAnnotation(
        path=labels / annotation["file_name"],
        segments={entry["id"]: taxonomy.source_to_index[entry["category_id"]] for entry in entries},
        crowds=frozenset(entry["id"] for entry in entries if entry.get("iscrowd")),
        num_things=taxonomy.num_things,
    )


def require_files(folder: Path, dataset: GroundTruthDataset) -> None:
    """Raise LabelStoreError if there are no images, or if image or label files are missing (naming up to three)."""
    files = [path for image in dataset.images for path in (image.path, *image.annotation.files)]
    if not files:
        raise LabelStoreError(f"{folder} contains no labeled image")
    if missing := [str(path) for path in files if not path.is_file()]:
        raise LabelStoreError(f"{folder} lacks {len(missing)} files: {', '.join(missing[:3])}")


def require_size(path: Path, label_map: np.ndarray, height: int, width: int) -> None:
    """Raise LabelStoreError unless the label has the size of its image."""
    if label_map.shape != (height, width):
        raise LabelStoreError(f"{path} has shape {label_map.shape}, its image {height, width}")


def read_label_png(path: Path) -> Int32[np.ndarray, "H W"]:
    """Read a one-channel PNG of 8 or 16 bits; a palette PNG gives its indices.

    Raises LabelStoreError if the file is missing or broken.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            label_map = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise LabelStoreError(f"{path} is not a label PNG: {error}") from error
    if label_map.ndim != 2:
        raise LabelStoreError(f"{path} has {label_map.shape[2]} channels, expected one")
    return label_map.astype(np.int32)


def crop_center(label_map: Int32[np.ndarray, "H W"], side_px: int) -> Int32[np.ndarray, "S S"]:
    """Scale the shorter side to `side_px` (nearest neighbor) and return the central square."""
    height, width = label_map.shape
    scale = side_px / min(height, width)
    target = (max(side_px, round(width * scale)), max(side_px, round(height * scale)))
    scaled = resize_labels(label_map, target[1], target[0])
    top, left = (scaled.shape[0] - side_px) // 2, (scaled.shape[1] - side_px) // 2
    return scaled[top : top + side_px, left : left + side_px]
