"""Reads a labeled dataset by folder and format: COCO files, and layouts with a file of labels for each image."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cyclopts import Parameter

from model.errors import ConfigError, DatasetError
from training.evaluation.datasets.coco import CocoKind, find_coco_file, read_coco
from training.evaluation.datasets.ground_truth import (
    Annotation,
    AnnotationKind,
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    ObjectAnnotation,
    check_files,
    labels_from_segments,
    object_from_mask,
    read_label_png,
)
from training.evaluation.datasets.taxonomy import CITYSCAPES, COCO_STUFF_27, VOC, ClassGrouping, Taxonomy

DatasetFormat = Literal[
    "panoptic", "instances", "coco", "coco-instances", "coco-stuff", "cityscapes", "voc-masks", "voc-boxes"
]  # fmt: skip
"""Layout of a dataset; `panoptic` and `instances` are single files in COCO's formats, the others published layouts."""
_COCO_STUFF_CROP_PX = 320
_SUFFIXES = ("_leftImg8bit.png", "_gtFine_instanceIds.png")
"""Of Cityscapes' photos and labels."""
_MIN_INSTANCE_ID = 1000
_VOC_BORDER = 255


class CocoStuffAnnotation(Annotation):
    """A PNG with a class for each pixel."""

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Each class is one segment, whose id is the category index + 1."""
        class_map = read_label_png(self.files[0])
        table = np.zeros(max(int(class_map.max()) + 1, 256), np.int32)
        for value, index in COCO_STUFF_27.source_to_index.items():
            table[value] = index + 1
        label_map = table[class_map]
        segments = {int(segment): int(segment) - 1 for segment in np.unique(label_map) if segment}
        return GroundTruthLabels(label_map=label_map, segments=segments, crowds=frozenset(), objects=())


class CityscapesAnnotation(Annotation):
    """`instanceIds` PNG: the label id, or 1000 * label id + instance number for a single object."""

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Things without an instance number are crowds (cityscapesScripts, createPanopticImgs.py)."""
        label_map = read_label_png(self.files[0])
        segments, crowds = {}, set()
        for value in np.unique(label_map).tolist():
            label = value // _MIN_INSTANCE_ID if value >= _MIN_INSTANCE_ID else value
            if label in CITYSCAPES.source_to_index:
                segments[value] = CITYSCAPES.source_to_index[label]
                if CITYSCAPES.is_thing(segments[value]) and value < _MIN_INSTANCE_ID:
                    crowds.add(value)
        return labels_from_segments(label_map, segments, frozenset(crowds), CITYSCAPES.num_things)


class VocMaskAnnotation(Annotation):
    """`SegmentationObject` and `SegmentationClass` PNGs; the border around objects belongs to no object."""

    def read(self, height: int, width: int) -> GroundTruthLabels:
        object_map, class_map = map(read_label_png, self.files)
        objects = []
        for value in np.setdiff1d(object_map, (0, _VOC_BORDER)).tolist():
            mask = object_map == value
            label = int(np.bincount(class_map[mask]).argmax())
            if label not in VOC.source_to_index:
                raise DatasetError(f"{self.files[1]}: object {value} has the unknown class {label}")
            objects.append(object_from_mask(mask, VOC.source_to_index[label], is_crowd=False))
        return GroundTruthLabels(label_map=None, segments={}, crowds=frozenset(), objects=tuple(objects))


def read_coco_stuff(folder: Path, split: str) -> GroundTruthDataset:
    """Read `images/SPLIT/*.jpg`, `annotations/SPLIT/*.png` of COCO-Stuff-164k in the 27 classes of PiCIE and STEGO.

    As there, evaluated on the central 320-pixel square of the image scaled to a shorter side of 320.
    Unlike there, the network sees the whole image, and all images count: to use a curated list, keep only its labels.
    """
    labels = sorted((folder / "annotations" / split).glob("*.png"))
    images = [
        (folder / "images" / split / f"{label.stem}.jpg", CocoStuffAnnotation(files=(label,))) for label in labels
    ]
    split = f"{split}, center crop of {_COCO_STUFF_CROP_PX} px"
    return _make_dataset(folder, split, "semantic", COCO_STUFF_27, images, crop_px=_COCO_STUFF_CROP_PX)


def read_cityscapes(folder: Path, split: str) -> GroundTruthDataset:
    """Read `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_instanceIds.png`."""
    labels = folder / "gtFine" / split
    images = [
        (photo, CityscapesAnnotation(files=(labels / photo.parent.name / photo.name.replace(*_SUFFIXES),)))
        for photo in sorted((folder / "leftImg8bit" / split).glob(f"*/*{_SUFFIXES[0]}"))
    ]
    return _make_dataset(folder, split, "panoptic", CITYSCAPES, images)


def read_voc_masks(folder: Path, split: str) -> GroundTruthDataset:
    """Read `JPEGImages`, `SegmentationObject`, `SegmentationClass`; the split from `ImageSets/Segmentation`."""
    images = [
        (
            folder / "JPEGImages" / f"{stem}.jpg",
            VocMaskAnnotation(
                files=(folder / "SegmentationObject" / f"{stem}.png", folder / "SegmentationClass" / f"{stem}.png")
            ),
        )
        for stem in _read_voc_split(folder, "Segmentation", split)
    ]
    return _make_dataset(folder, f"{split}, masks", "masks", VOC, images)


def read_voc_boxes(folder: Path, split: str) -> GroundTruthDataset:
    """Read `JPEGImages` and `Annotations`; the split from `ImageSets/Main`, which has more images than the masks."""
    images = [
        (folder / "JPEGImages" / f"{stem}.jpg", _read_voc_objects(folder / "Annotations" / f"{stem}.xml"))
        for stem in _read_voc_split(folder, "Main", split)
    ]
    return _make_dataset(folder, f"{split}, boxes", "boxes", VOC, images)


def _make_dataset(
    folder: Path,
    title: str,
    kind: AnnotationKind,
    taxonomy: Taxonomy,
    images: Iterable[tuple[Path, Annotation]],
    crop_px: int | None = None,
) -> GroundTruthDataset:
    """Number the images from 1, and check that all files are there. Raises DatasetError."""
    dataset = GroundTruthDataset(
        name=f"{folder.resolve().name}, {title}",
        kind=kind,
        taxonomy=taxonomy,
        images=tuple(
            GroundTruthImage(image_id=image_id, path=path, annotation=annotation)
            for image_id, (path, annotation) in enumerate(images, start=1)
        ),
        crop_px=crop_px,
    )
    check_files(folder, dataset)
    return dataset


def _read_voc_split(folder: Path, task: str, split: str) -> list[str]:
    path = folder / "ImageSets" / task / f"{split}.txt"
    try:
        return sorted(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{folder} is not a VOC folder: cannot read {path} ({error})") from error


def _read_voc_objects(path: Path) -> ObjectAnnotation:
    """Read VOC's XML; objects marked as difficult become crowds."""
    try:
        objects = [_parse_voc_object(entry) for entry in ElementTree.parse(path).getroot().iter("object")]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"{path} is not a VOC annotation: {error}") from error
    return ObjectAnnotation(objects=tuple(objects))


def _parse_voc_object(entry: ElementTree.Element) -> GroundTruthObject:
    """Corners are pixels counted from 1, both inside the box."""
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


_PUBLISHED: dict[DatasetFormat | None, tuple[Callable[[Path, str], GroundTruthDataset], str]] = {
    "coco-stuff": (read_coco_stuff, "val2017"),
    "cityscapes": (read_cityscapes, "val"),
    "voc-masks": (read_voc_masks, "val"),
    "voc-boxes": (read_voc_boxes, "val"),
}
"""The readers of layouts without a COCO file, and their validation splits."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which labeled dataset to read."""

    folder: Annotated[Path, Parameter(name="--dataset")]
    """Labeled dataset: a COCO file (JSON, panoptic or instances), or the folder that has one, such as an export of
    CVAT, Label Studio, Roboflow or FiftyOne: panoptic.json, instances.json, annotations/panoptic_SPLIT.json,
    annotations/instances_SPLIT.json, SPLIT/_annotations.coco.json, _annotations.coco.json, result.json or labels.json.
    Photos are found next to the file: in its folder, in images/, data/, ../SPLIT/ or ../images/SPLIT/."""
    format: DatasetFormat | None = None
    """Layout of the dataset (default: the first of those files). coco: annotations/panoptic_SPLIT.json and .png,
    SPLIT/. coco-instances: annotations/instances_SPLIT.json, SPLIT/. coco-stuff: annotations/SPLIT/, images/SPLIT/.
    cityscapes: leftImg8bit/SPLIT/, gtFine/SPLIT/. voc-masks: JPEGImages/, SegmentationObject/, SegmentationClass/,
    ImageSets/Segmentation/SPLIT.txt. voc-boxes: JPEGImages/, Annotations/, ImageSets/Main/SPLIT.txt."""
    split: str | None = None
    """Split of the dataset, where it has several (default: its validation split)."""
    classes: ClassGrouping = "supercategories"
    """Classes of a dataset in COCO's panoptic format: things and stuff by supercategory, or every thing by itself."""

    def __post_init__(self) -> None:
        if self.format in ("panoptic", "instances") and self.split:
            raise ConfigError(f"format {self.format} has no splits, got {self.split!r}: choose another format")
        if self.format not in (None, "panoptic", "coco") and self.classes != "supercategories":
            raise ConfigError(f"format {self.format} has fixed classes, got {self.classes!r}")

    def read(self) -> GroundTruthDataset:
        """Raises DatasetError if the dataset is incomplete or not in this format."""
        folder = self.folder.resolve()  # processes on other machines may have another working directory
        if self.format in _PUBLISHED:
            read, split = _PUBLISHED[self.format]
            return read(folder, self.split or split)
        return self._read_coco(folder)

    def _read_coco(self, source: Path) -> GroundTruthDataset:
        """Read a COCO file: `source` itself, or the one in that folder."""
        if source.is_file() and (self.split or self.format in ("coco", "coco-instances")):
            raise ConfigError(f"{source} is one file, without splits: give its folder with --split or --format")
        kind: CocoKind | None = None
        match self.format:
            case "panoptic" | "instances":
                kind = self.format
                path = source if source.is_file() else source / f"{kind}.json"
            case "coco" | "coco-instances":
                kind = "panoptic" if self.format == "coco" else "instances"
                path = source / "annotations" / f"{kind}_{self.split or 'val2017'}.json"
            case _:
                path = find_coco_file(source, self.split)
        folder = path.parent if source.is_file() else source
        name = folder.name if path.name == "panoptic.json" else f"{folder.name}, {path.relative_to(folder).stem}"
        return read_coco(path, name, self.classes, kind)
