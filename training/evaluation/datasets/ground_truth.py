"""Labeled datasets for evaluation: images and their ground truth."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32
from PIL import Image
from pycocotools import mask as coco

from model.errors import DatasetError
from model.images import read_image_size, resize_labels
from model.progress import track
from training.data.dataset import read_label_map
from training.evaluation.datasets.taxonomy import Taxonomy

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

    def draw_segments(self, height: int, width: int) -> "GroundTruthLabels":
        """Return the labels with a label map: its own, or one of the objects with masks, small ones on top."""
        if self.label_map is not None:
            return self
        masked = sorted((each for each in self.objects if each.rle is not None), key=lambda each: -each.area)
        label_map = np.zeros((height, width), np.int32)
        for segment, each in enumerate(masked, start=1):
            label_map[coco.decode(each.rle).astype(bool)] = segment
        return replace(
            self,
            label_map=label_map,
            segments={segment: each.category for segment, each in enumerate(masked, start=1)},
            crowds=frozenset(segment for segment, each in enumerate(masked, start=1) if each.is_crowd),
        )


@dataclass(frozen=True, kw_only=True)
class Annotation(ABC):
    """The labels of one image."""

    files: tuple[Path, ...] = ()
    """Files that must exist."""

    @abstractmethod
    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Return the labels of the image, whose size this is. Raises DatasetError for a broken file."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthImage:
    """One labeled image."""

    image_id: int
    path: Path
    annotation: Annotation
    size: tuple[int, int] | None = None
    """Height and width that the dataset states, if it does."""


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
    skipped: tuple[str, ...] = ()
    """What was left out of the dataset's file or repaired, one line for each reason."""


@dataclass(frozen=True, kw_only=True)
class ObjectAnnotation(Annotation):
    """Objects that may overlap, in memory."""

    objects: tuple[GroundTruthObject, ...]

    def read(self, height: int, width: int) -> GroundTruthLabels:
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=self.objects)


@dataclass(frozen=True, kw_only=True)
class PanopticAnnotation(Annotation):
    """Segments in COCO's panoptic format."""

    segments: dict[int, int]
    crowds: frozenset[int]
    num_things: int

    def read(self, height: int, width: int) -> GroundTruthLabels:
        return labels_from_segments(read_label_map(self.files[0]), self.segments, self.crowds, self.num_things)


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


def check_files(folder: Path, dataset: GroundTruthDataset) -> None:
    """Check, from their headers alone, that photos and label PNGs exist and have the same size.

    Raises DatasetError if there are no images, if files are missing (naming up to three), or if a size differs.
    """
    files = [path for image in dataset.images for path in (image.path, *image.annotation.files)]
    if not files:
        raise DatasetError(f"{folder} contains no labeled image")
    if missing := [str(path) for path in files if not path.is_file()]:
        raise DatasetError(f"{folder} lacks {len(missing)} files: {', '.join(missing[:3])}")
    for image in track(dataset.images, "check images", unit="image"):
        size = read_image_size(image.path)
        if image.size not in (None, size):
            height, width = image.size
            raise DatasetError(
                f"image {image.image_id} has {width}x{height} pixels in {folder}, but {image.path} has "
                f"{size[1]}x{size[0]} when it is upright"
            )
        for label in (path for path in image.annotation.files if path.suffix == ".png"):
            if read_image_size(label) != size:
                height, width = read_image_size(label)
                raise DatasetError(f"{label} has {width}x{height} pixels, {image.path} {size[1]}x{size[0]}")


def read_label_png(path: Path) -> Int32[np.ndarray, "H W"]:
    """Read a one-channel PNG of 8 or 16 bits; a palette PNG gives its indices. Raises DatasetError."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            label_map = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} is not a label PNG: {error}") from error
    if label_map.ndim != 2:
        raise DatasetError(f"{path} has {label_map.shape[2]} channels, expected one")
    return label_map.astype(np.int32)


def crop_center(label_map: Int32[np.ndarray, "H W"], side_px: int) -> Int32[np.ndarray, "S S"]:
    """Scale the shorter side to `side_px` (nearest neighbor) and return the central square."""
    height, width = label_map.shape
    scale = side_px / min(height, width)
    target = (max(side_px, round(width * scale)), max(side_px, round(height * scale)))
    scaled = resize_labels(label_map, target[1], target[0])
    top, left = (scaled.shape[0] - side_px) // 2, (scaled.shape[1] - side_px) // 2
    return scaled[top : top + side_px, left : left + side_px]
