"""Datasets in COCO's panoptic and instance formats."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from model.errors import ConfigError
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
    ObjectAnnotation,
    PanopticAnnotation,
    check_files,
)
from training.evaluation.datasets.taxonomy import ClassGrouping, build_taxonomy, build_thing_taxonomy

logger = logging.getLogger(__name__)

CocoKind = Literal["panoptic", "instances"]


def read_coco(
    path: Path,
    name: str,
    grouping: ClassGrouping,
    kind: CocoKind | None = None,
) -> GroundTruthDataset:
    """Read a file in COCO's panoptic or instance format; None for `kind` finds out which of them it is.

    The photos are found next to the file. A file without any mask has boxes only. Raises DatasetError if something is
    missing, invalid or inconsistent, and ConfigError for a grouping of classes that the format does not have.
    """
    content = read_coco_json(path)
    if kind is None:
        kind = "panoptic" if any("segments_info" in entry for entry in content["annotations"]) else "instances"
    if kind == "panoptic":
        dataset = _read_panoptic(path, content, grouping)
    elif grouping != "supercategories":
        raise ConfigError(f"{path} has instances, whose classes are fixed, got {grouping!r}")
    else:
        dataset = _read_instances(path, content)
    check_files(path, dataset)
    for line in dataset.skipped:
        logger.warning("%s: left out %s", path, line)
    return replace(dataset, name=name)


def _read_panoptic(path: Path, content: dict[str, Any], grouping: ClassGrouping) -> GroundTruthDataset:
    left_out = LeftOut()
    taxonomy = build_taxonomy(check_categories(path, content, is_panoptic=True), grouping)
    files = read_images(path, content, left_out)
    annotations = read_panoptic_entries(path, content["annotations"], files, taxonomy.source_to_index, left_out)
    names = [entry["file_name"] for entry in annotations.values()]
    folder = find_folder(path, PNG_FOLDERS, names)
    images = tuple(
        GroundTruthImage(
            image_id=number,
            path=files[number].path,
            size=files[number].size,
            annotation=PanopticAnnotation(
                files=(folder / entry["file_name"],),
                segments={each["id"]: taxonomy.source_to_index[each["category_id"]] for each in entry["segments_info"]},
                crowds=frozenset(each["id"] for each in entry["segments_info"] if each.get("iscrowd")),
                num_things=taxonomy.num_things,
            ),
        )
        for number, entry in sorted(annotations.items())
    )
    skipped = left_out.describe()
    return GroundTruthDataset(name="", kind="panoptic", taxonomy=taxonomy, images=images, skipped=skipped)


def _read_instances(path: Path, content: dict[str, Any]) -> GroundTruthDataset:
    """Images without an object are included."""
    left_out = LeftOut()
    categories = check_categories(path, content, is_panoptic=False)
    taxonomy = build_thing_taxonomy(categories)
    files = read_images(path, content, left_out)
    objects = read_objects(path, content["annotations"], files, taxonomy.source_to_index, left_out)
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
