"""Labelled pictures: what results are held against, never trained on."""

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
from training.choices import ClassGrouping as Classes
from training.data.dataset import read_label_map
from training.evaluation.datasets.taxonomy import Taxonomy, build_taxonomy

PANOPTIC_FILE = "panoptic.json"
AnnotationKind = Literal["panoptic", "semantic", "masks", "boxes"]
"""What a set knows: everything, a class for every pixel, objects with masks, or objects with boxes alone."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthObject:
    """An object of a labelled picture."""

    category: int
    """Its place in the taxonomy."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height."""
    area: float
    is_crowd: bool
    """A group, or an object that need not be found."""
    rle: dict[str, Any] | None
    """In COCO's words; None where only its box is known."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthLabels:
    """What is known of one picture."""

    label_map: Int32[np.ndarray, "H W"] | None
    """Segment ids; those not in `segments` are void. None where only objects are known."""
    segments: dict[int, int]
    """Segment id to the place of its category in the taxonomy."""
    crowds: frozenset[int]
    objects: tuple[GroundTruthObject, ...]


class Annotation(Protocol):
    """The label of one picture on disk."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What must be there."""
        ...

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Raises LabelStoreError unless it is a label for a picture of this size."""
        ...


@dataclass(frozen=True, kw_only=True)
class GroundTruthImage:
    """One labelled picture."""

    image_id: int
    path: Path
    annotation: Annotation


@dataclass(frozen=True, kw_only=True)
class GroundTruthDataset:
    """A labelled set."""

    name: str
    """The folder, and the split of a published set."""
    kind: AnnotationKind
    taxonomy: Taxonomy
    images: tuple[GroundTruthImage, ...]
    crop_px: int | None = None
    """Scores are taken on the central square of this side, once the short side has been scaled to it."""


@dataclass(frozen=True, kw_only=True)
class PanopticAnnotation:
    """Segments of COCO's panoptic format."""

    path: Path
    segments: dict[int, int]
    crowds: frozenset[int]
    things: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        label_map = read_label_map(self.path)
        require_size(self.path, label_map, height, width)
        return labels_from_segments(label_map, self.segments, self.crowds, self.things)


def labels_from_segments(
    label_map: Int32[np.ndarray, "H W"], segments: dict[int, int], crowds: frozenset[int], things: int
) -> GroundTruthLabels:
    """Labels whose objects are the things of the label map that have a pixel."""
    objects = []
    for segment, category in segments.items():
        mask = label_map == segment
        if category < things and mask.any():
            objects.append(object_from_mask(mask, category, is_crowd=segment in crowds))
    return GroundTruthLabels(label_map=label_map, segments=segments, crowds=crowds, objects=tuple(objects))


def object_from_mask(mask: Bool[np.ndarray, "H W"], category: int, *, is_crowd: bool) -> GroundTruthObject:
    """The object that a mask shows."""
    rle = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    left, top, width, height = coco.toBbox(rle).tolist()
    return GroundTruthObject(
        category=category, bbox=(left, top, width, height), area=float(mask.sum()), is_crowd=is_crowd, rle=rle
    )


def read_panoptic_folder(folder: Path, protocol: Classes = "supercategories") -> GroundTruthDataset:
    """Our own layout: `panoptic.json` as COCO has it, the photos in `images/`, the PNGs in `panoptic/`."""
    truth = read_panoptic_dataset(folder, folder / PANOPTIC_FILE, folder / "images", folder / "panoptic", protocol)
    return replace(truth, name=folder.resolve().name)


def read_panoptic_dataset(
    folder: Path, index: Path, photos: Path, labels: Path, protocol: Classes
) -> GroundTruthDataset:
    """A set in COCO's panoptic format.

    Raises LabelStoreError if something is missing or does not fit together.
    """
    try:
        content = json.loads(index.read_bytes())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        taxonomy = build_taxonomy(content["categories"], protocol)
        pictures = tuple(
            GroundTruthImage(
                image_id=annotation["image_id"],
                path=photos / files[annotation["image_id"]],
                annotation=_read_segments(annotation, labels, taxonomy),
            )
            for annotation in sorted(content["annotations"], key=lambda each: int(each["image_id"]))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is no labelled set in COCO's panoptic format: {error!r}") from error
    truth = GroundTruthDataset(
        name=f"{folder.resolve().name}, {index.stem}", kind="panoptic", taxonomy=taxonomy, images=pictures
    )
    require_files(folder, truth)
    return truth


def _read_segments(annotation: dict[str, Any], labels: Path, taxonomy: Taxonomy) -> PanopticAnnotation:
    entries = annotation["segments_info"]
    if strangers := {each["category_id"] for each in entries} - set(taxonomy.index):
        raise ValueError(f"categories {sorted(strangers)} are not listed")
    return PanopticAnnotation(
        path=labels / annotation["file_name"],
        segments={each["id"]: taxonomy.index[each["category_id"]] for each in entries},
        crowds=frozenset(each["id"] for each in entries if each.get("iscrowd")),
        things=taxonomy.things,
    )


def require_files(folder: Path, truth: GroundTruthDataset) -> None:
    """Raise LabelStoreError, naming a few, if photos or labels are missing, or there is none."""
    files = [path for each in truth.images for path in (each.path, *each.annotation.files)]
    if not files:
        raise LabelStoreError(f"{folder} holds no labelled picture")
    if missing := [str(path) for path in files if not path.is_file()]:
        raise LabelStoreError(f"{folder} lacks {len(missing)} files: {', '.join(missing[:3])}")


def require_size(path: Path, label_map: np.ndarray, height: int, width: int) -> None:
    """Raise LabelStoreError unless the label has its photo's size."""
    if label_map.shape != (height, width):
        raise LabelStoreError(f"{path} has the shape {label_map.shape}, its photo {height, width}")


def read_label_png(path: Path) -> Int32[np.ndarray, "H W"]:
    """The values of a one-channel PNG, 8 or 16 bits; palette pictures give their indices.

    Raises LabelStoreError if it is missing or broken.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            plane = np.array(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise LabelStoreError(f"{path} is no label picture: {error}") from error
    if plane.ndim != 2:
        raise LabelStoreError(f"{path} has {plane.shape[2]} channels, expected one")
    return plane.astype(np.int32)


def crop_center(label_map: Int32[np.ndarray, "H W"], side_px: int) -> Int32[np.ndarray, "S S"]:
    """The central square once the short side is `side_px`, each pixel taking the nearest label."""
    height, width = label_map.shape
    scale = side_px / min(height, width)
    target = (max(side_px, round(width * scale)), max(side_px, round(height * scale)))
    scaled = resize_labels(label_map, target[1], target[0])
    top, left = (scaled.shape[0] - side_px) // 2, (scaled.shape[1] - side_px) // 2
    return scaled[top : top + side_px, left : left + side_px]
