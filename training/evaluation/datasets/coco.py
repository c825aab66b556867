"""Datasets in COCO's panoptic and instance formats, COCO-Stuff and UVO."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.errors import ConfigError, DatasetError
from training.evaluation.datasets.coco_file import (
    PNG_FOLDERS,
    LeftOut,
    check_categories,
    find_folder,
    read_coco_json,
    read_images,
    read_objects,
    read_panoptic_entries,
)
from training.evaluation.datasets.ground_truth import (
    AnnotationKind,
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    ObjectAnnotation,
    PanopticAnnotation,
    check_files,
    read_label_png,
    require_size,
)
from training.evaluation.datasets.taxonomy import COCO_STUFF_27, ClassGrouping, build_taxonomy, build_thing_taxonomy

logger = logging.getLogger(__name__)

CocoKind = Literal["panoptic", "instances"]
_COCO_STUFF_CROP_PX = 320


@dataclass(frozen=True, kw_only=True)
class ClassPngAnnotation:
    """A PNG with a class for each pixel."""

    path: Path
    source_to_index: dict[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Each class is one segment, whose id is the category index + 1."""
        class_map = read_label_png(self.path)
        require_size(self.path, class_map, height, width)
        table = np.zeros(max(int(class_map.max()) + 1, 256), np.int32)
        for value, index in self.source_to_index.items():
            table[value] = index + 1
        label_map = table[class_map]
        segments = {int(segment): int(segment) - 1 for segment in np.unique(label_map) if segment}
        return GroundTruthLabels(label_map=label_map, segments=segments, crowds=frozenset(), objects=())


def read_coco(
    path: Path,
    name: str,
    grouping: ClassGrouping,
    kind: CocoKind | None = None,
    *,
    photos: Path | None = None,
    without: tuple[str, ...] = (),
) -> GroundTruthDataset:
    """Read a file in COCO's panoptic or instance format; None for `kind` finds out which of them it is.

    `photos` is the folder of the photos (default: found next to the file). Categories whose name starts with one of
    `without` are left out. A file without any mask has boxes only. Raises DatasetError if something is missing,
    invalid or inconsistent, and ConfigError for a grouping of classes that the format does not have.
    """
    content = read_coco_json(path)
    if kind is None:
        kind = "panoptic" if any("segments_info" in entry for entry in content["annotations"]) else "instances"
    if kind == "panoptic":
        dataset = _read_panoptic(path, content, photos, grouping)
    elif grouping != "supercategories":
        raise ConfigError(f"{path} has instances, whose classes are fixed, got {grouping!r}")
    else:
        dataset = _read_instances(path, content, photos, without)
    check_files(path, dataset)
    for line in dataset.skipped:
        logger.warning("%s: left out %s", path, line)
    return replace(dataset, name=name)


def read_uvo_frames(folder: Path, split: str) -> GroundTruthDataset:
    """Read `FrameSet/UVO_frame_SPLIT.json`, `uvo_videos_sparse_frames/VIDEO/*.png`; without the category "other"."""
    path = folder / "FrameSet" / f"UVO_frame_{split}.json"
    name = f"{folder.resolve().name}, {path.stem}"
    photos = folder / "uvo_videos_sparse_frames"
    return read_coco(path, name, "supercategories", "instances", photos=photos, without=("other",))


def read_uvo_videos(folder: Path, split: str) -> GroundTruthDataset:
    """Read `VideoDenseSet/UVO_video_SPLIT_dense.json`, `uvo_videos_dense_frames/VIDEO/*.png`; one image per frame."""
    path = folder / "VideoDenseSet" / f"UVO_video_{split}_dense.json"
    try:
        content = json.loads(path.read_bytes())
        frames = [(video["id"], *frame) for video in content["videos"] for frame in enumerate(video["file_names"])]
        numbers = {(video, frame): number for number, (video, frame, _) in enumerate(frames, start=1)}
        annotations = [
            {
                "image_id": numbers[track["video_id"], frame],
                "category_id": track["category_id"],
                "segmentation": segmentation,
                "iscrowd": track.get("iscrowd", 0),
            }
            for track in content["annotations"]
            for frame, segmentation in enumerate(track["segmentations"])
            if segmentation
        ]
        images = [{"id": number, "file_name": name} for number, (*_, name) in enumerate(frames, start=1)]
        frames_content = {"images": images, "annotations": annotations, "categories": content["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is not a UVO video dataset: {error!r}") from error
    dataset = _read_instances(path, frames_content, folder / "uvo_videos_dense_frames", ("other",))
    check_files(path, dataset)
    return replace(dataset, name=f"{folder.resolve().name}, {path.stem}")


def read_coco_stuff(folder: Path, split: str) -> GroundTruthDataset:
    """Read `images/SPLIT/*.jpg`, `annotations/SPLIT/*.png` of COCO-Stuff-164k in the 27 classes of PiCIE and STEGO.

    As there, evaluated on the central 320-pixel square of the image scaled to a shorter side of 320.
    Unlike there, the network sees the whole image, and all images count: to use a curated list, keep only its labels.
    """
    labels = sorted((folder / "annotations" / split).glob("*.png"))
    images = tuple(
        GroundTruthImage(
            image_id=image_id,
            path=folder / "images" / split / f"{label.stem}.jpg",
            annotation=ClassPngAnnotation(path=label, source_to_index=COCO_STUFF_27.source_to_index),
        )
        for image_id, label in enumerate(labels, start=1)
    )
    name = f"{folder.resolve().name}, {split}, center crop of {_COCO_STUFF_CROP_PX} px"
    dataset = GroundTruthDataset(
        name=name, kind="semantic", taxonomy=COCO_STUFF_27, images=images, crop_px=_COCO_STUFF_CROP_PX
    )
    check_files(folder, dataset)
    return dataset


def _read_panoptic(
    path: Path, content: dict[str, Any], photos: Path | None, grouping: ClassGrouping
) -> GroundTruthDataset:
    left_out = LeftOut()
    taxonomy = build_taxonomy(check_categories(path, content, is_panoptic=True), grouping)
    files = read_images(path, content, photos, left_out)
    annotations = read_panoptic_entries(path, content["annotations"], files, taxonomy.source_to_index, left_out)
    names = [entry["file_name"] for entry in annotations.values()]
    folder = find_folder(path, PNG_FOLDERS, names)
    images = tuple(
        GroundTruthImage(
            image_id=number,
            path=files[number].path,
            size=files[number].size,
            annotation=PanopticAnnotation(
                path=folder / entry["file_name"],
                segments={each["id"]: taxonomy.source_to_index[each["category_id"]] for each in entry["segments_info"]},
                crowds=frozenset(each["id"] for each in entry["segments_info"] if each.get("iscrowd")),
                num_things=taxonomy.num_things,
            ),
        )
        for number, entry in sorted(annotations.items())
    )
    skipped = left_out.describe()
    return GroundTruthDataset(name="", kind="panoptic", taxonomy=taxonomy, images=images, skipped=skipped)


def _read_instances(
    path: Path, content: dict[str, Any], photos: Path | None, without: tuple[str, ...]
) -> GroundTruthDataset:
    """Images without an object are included."""
    left_out = LeftOut()
    categories = check_categories(path, content, is_panoptic=False)
    taxonomy = build_thing_taxonomy(categories, without=without)
    files = read_images(path, content, photos, left_out)
    indices = {each["id"]: taxonomy.source_to_index.get(each["id"]) for each in categories}
    objects = read_objects(path, content["annotations"], files, indices, left_out)
    images = tuple(
        GroundTruthImage(
            image_id=number,
            path=files[number].path,
            size=files[number].size,
            annotation=ObjectAnnotation(objects=tuple(objects[number])),
        )
        for number in sorted(files)
    )
    is_boxes = any(objects.values()) and all(each.rle is None for found in objects.values() for each in found)
    kind: AnnotationKind = "boxes" if is_boxes else "masks"
    return GroundTruthDataset(name="", kind=kind, taxonomy=taxonomy, images=images, skipped=left_out.describe())
