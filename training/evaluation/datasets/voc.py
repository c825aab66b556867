"""PASCAL VOC as it is published."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import LabelStoreError
from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    object_from_mask,
    read_label_png,
    require_files,
    require_size,
)
from training.evaluation.datasets.taxonomy import VOC

_BORDER = 255


@dataclass(frozen=True, kw_only=True)
class VocMaskAnnotation:
    """VOC's object picture beside its class picture; the border between them is no object's."""

    objects: Path
    classes: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.objects, self.classes)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        numbers, classes = read_label_png(self.objects), read_label_png(self.classes)
        require_size(self.objects, numbers, height, width)
        require_size(self.classes, classes, height, width)
        found = []
        for value in np.unique(numbers).tolist():
            if value in (0, _BORDER):
                continue
            mask = numbers == value
            label = int(np.bincount(classes[mask]).argmax())
            if label not in VOC.index:
                raise LabelStoreError(f"{self.classes}: object {value} has the class {label}")
            found.append(object_from_mask(mask, VOC.index[label], is_crowd=False))
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=tuple(found))


@dataclass(frozen=True, kw_only=True)
class VocBoxAnnotation:
    """VOC's XML; its corners are pixels counted from 1, both inside."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Objects marked difficult need not be found."""
        try:
            found = [_read_box(each) for each in ElementTree.parse(self.path).getroot().iter("object")]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise LabelStoreError(f"{self.path} is no VOC annotation: {error}") from error
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=tuple(found))


def read_voc_masks(folder: Path, split: str) -> GroundTruthDataset:
    """`JPEGImages`, `SegmentationObject`, `SegmentationClass`, the split in `ImageSets/Segmentation`."""
    pictures = tuple(
        GroundTruthImage(
            image_id=number,
            path=folder / "JPEGImages" / f"{name}.jpg",
            annotation=VocMaskAnnotation(
                objects=folder / "SegmentationObject" / f"{name}.png",
                classes=folder / "SegmentationClass" / f"{name}.png",
            ),
        )
        for number, name in enumerate(_read_split(folder, "Segmentation", split), start=1)
    )
    truth = GroundTruthDataset(
        name=f"{folder.resolve().name}, {split}, masks", kind="masks", taxonomy=VOC, images=pictures
    )
    require_files(folder, truth)
    return truth


def read_voc_boxes(folder: Path, split: str) -> GroundTruthDataset:
    """`JPEGImages`, `Annotations`, the split in `ImageSets/Main`: many more pictures than have masks."""
    pictures = tuple(
        GroundTruthImage(
            image_id=number,
            path=folder / "JPEGImages" / f"{name}.jpg",
            annotation=VocBoxAnnotation(path=folder / "Annotations" / f"{name}.xml"),
        )
        for number, name in enumerate(_read_split(folder, "Main", split), start=1)
    )
    truth = GroundTruthDataset(
        name=f"{folder.resolve().name}, {split}, boxes", kind="boxes", taxonomy=VOC, images=pictures
    )
    require_files(folder, truth)
    return truth


def _read_split(folder: Path, task: str, split: str) -> list[str]:
    path = folder / "ImageSets" / task / f"{split}.txt"
    try:
        return sorted(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise LabelStoreError(f"{folder} is no VOC folder: {path} cannot be read ({error})") from error


def _read_box(entry: ElementTree.Element) -> GroundTruthObject:
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
