"""Cityscapes in its published layout."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    check_files,
    labels_from_segments,
    read_label_png,
    require_size,
)
from training.evaluation.datasets.taxonomy import CITYSCAPES

_PHOTO_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_instanceIds.png"
_MIN_INSTANCE_ID = 1000


@dataclass(frozen=True, kw_only=True)
class CityscapesAnnotation:
    """`instanceIds` PNG: the label id, or 1000 * label id + instance number for a single object."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """Things without an instance number are crowds (cityscapesScripts, createPanopticImgs.py)."""
        label_map = read_label_png(self.path)
        require_size(self.path, label_map, height, width)
        segments, crowds = {}, set()
        for value in np.unique(label_map).tolist():
            label = value // _MIN_INSTANCE_ID if value >= _MIN_INSTANCE_ID else value
            if label in CITYSCAPES.source_to_index:
                segments[value] = CITYSCAPES.source_to_index[label]
                if CITYSCAPES.is_thing(segments[value]) and value < _MIN_INSTANCE_ID:
                    crowds.add(value)
        return labels_from_segments(label_map, segments, frozenset(crowds), CITYSCAPES.num_things)


def read_cityscapes(folder: Path, split: str) -> GroundTruthDataset:
    """Read `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_instanceIds.png`."""
    photos = sorted((folder / "leftImg8bit" / split).glob(f"*/*{_PHOTO_SUFFIX}"))
    labels = folder / "gtFine" / split
    images = tuple(
        GroundTruthImage(
            image_id=image_id,
            path=photo,
            annotation=CityscapesAnnotation(
                path=labels / photo.parent.name / photo.name.replace(_PHOTO_SUFFIX, _LABEL_SUFFIX)
            ),
        )
        for image_id, photo in enumerate(photos, start=1)
    )
    name = f"{folder.resolve().name}, {split}"
    dataset = GroundTruthDataset(name=name, kind="panoptic", taxonomy=CITYSCAPES, images=images)
    check_files(folder, dataset)
    return dataset
