"""PASCAL VOC in its published layout."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import DatasetError
from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    check_files,
    object_from_mask,
    read_label_png,
    require_size,
)
from training.evaluation.datasets.taxonomy import VOC

_BORDER = 255


@dataclass(frozen=True, kw_only=True)
class VocMaskAnnotation:
    """`SegmentationObject` and `SegmentationClass` PNGs; the border around objects belongs to no object."""

    objects: Path
    classes: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.objects, self.classes)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        object_map, class_map = read_label_png(self.objects), read_label_png(self.classes)
        require_size(self.objects, object_map, height, width)
        require_size(self.classes, class_map, height, width)
        objects = []
        for value in np.unique(object_map).tolist():
            if value in (0, _BORDER):
                continue
            mask = object_map == value
            label = int(np.bincount(class_map[mask]).argmax())
            if label not in VOC.source_to_index:
                raise DatasetError(f"{self.classes}: object {value} has the unknown class {label}")
            objects.append(object_from_mask(mask, VOC.source_to_index[label], is_crowd=False))
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=tuple(objects))


@dataclass(frozen=True, kw_only=True)
class VocBoxAnnotation:
    """VOC's XML. Corners are pixels counted from 1, both inside the box."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Objects marked as difficult become crowds."""
        try:
            objects = [_parse_object(entry) for entry in ElementTree.parse(self.path).getroot().iter("object")]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise DatasetError(f"{self.path} is not a VOC annotation: {error}") from error
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=tuple(objects))


def read_voc_masks(folder: Path, split: str) -> GroundTruthDataset:
    """Read `JPEGImages`, `SegmentationObject`, `SegmentationClass`; the split from `ImageSets/Segmentation`."""
    images = tuple(
        GroundTruthImage(
            image_id=image_id,
            path=folder / "JPEGImages" / f"{stem}.jpg",
            annotation=VocMaskAnnotation(
                objects=folder / "SegmentationObject" / f"{stem}.png",
                classes=folder / "SegmentationClass" / f"{stem}.png",
            ),
        )
        for image_id, stem in enumerate(_read_split(folder, "Segmentation", split), start=1)
    )
    name = f"{folder.resolve().name}, {split}, masks"
    dataset = GroundTruthDataset(name=name, kind="masks", taxonomy=VOC, images=images)
    check_files(folder, dataset)
    return dataset


def read_voc_boxes(folder: Path, split: str) -> GroundTruthDataset:
    """Read `JPEGImages` and `Annotations`; the split from `ImageSets/Main`, which has more images than the masks."""
    images = tuple(
        GroundTruthImage(
            image_id=image_id,
            path=folder / "JPEGImages" / f"{stem}.jpg",
            annotation=VocBoxAnnotation(path=folder / "Annotations" / f"{stem}.xml"),
        )
        for image_id, stem in enumerate(_read_split(folder, "Main", split), start=1)
    )
    name = f"{folder.resolve().name}, {split}, boxes"
    dataset = GroundTruthDataset(name=name, kind="boxes", taxonomy=VOC, images=images)
    check_files(folder, dataset)
    return dataset


def _read_split(folder: Path, task: str, split: str) -> list[str]:
    path = folder / "ImageSets" / task / f"{split}.txt"
    try:
        return sorted(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{folder} is not a VOC folder: cannot read {path} ({error})") from error


def _parse_object(entry: ElementTree.Element) -> GroundTruthObject:
    name = entry.findtext("name", "").strip()
    if name not in VOC.names:
        raise ValueError(f"unknown class {name!r}")
    left, top, right, bottom = (
        float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    width, height = right - left + 1, bottom - top + 1
    return GroundTruthObject(
        category=VOC.names.index(name),
        bbox=(left - 1, top - 1, width, height),
        area=width * height,
        is_crowd=entry.findtext("difficult", "0").strip() == "1",
        rle=None,
    )
