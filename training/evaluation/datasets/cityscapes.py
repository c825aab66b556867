"""Cityscapes as it is published."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    labels_from_segments,
    read_label_png,
    require_files,
    require_size,
)
from training.evaluation.datasets.taxonomy import CITYSCAPES

_PHOTO = "_leftImg8bit.png"
_LABEL = "_gtFine_instanceIds.png"
_INSTANCES_FROM = 1000


@dataclass(frozen=True, kw_only=True)
class CityscapesAnnotation:
    """Cityscapes' instance picture: label id, or 1000 times it plus a number for a single object."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, height: int, width: int) -> GroundTruthLabels:
        """A thing without a number is a group (cityscapesScripts, createPanopticImgs.py)."""
        plane = read_label_png(self.path)
        require_size(self.path, plane, height, width)
        segments, crowds = {}, set()
        for value in np.unique(plane).tolist():
            label = value // _INSTANCES_FROM if value >= _INSTANCES_FROM else value
            if label in CITYSCAPES.index:
                segments[value] = CITYSCAPES.index[label]
                if CITYSCAPES.is_thing(segments[value]) and value < _INSTANCES_FROM:
                    crowds.add(value)
        return labels_from_segments(plane, segments, frozenset(crowds), CITYSCAPES.things)


def read_cityscapes(folder: Path, split: str) -> GroundTruthDataset:
    """`leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`, `gtFine/SPLIT/CITY/*_gtFine_instanceIds.png`."""
    photos = sorted((folder / "leftImg8bit" / split).glob(f"*/*{_PHOTO}"))
    labels = [folder / "gtFine" / split / each.parent.name / each.name.replace(_PHOTO, _LABEL) for each in photos]
    pictures = tuple(
        GroundTruthImage(image_id=number, path=photo, annotation=CityscapesAnnotation(path=label))
        for number, (photo, label) in enumerate(zip(photos, labels, strict=True), start=1)
    )
    truth = GroundTruthDataset(
        name=f"{folder.resolve().name}, {split}", kind="panoptic", taxonomy=CITYSCAPES, images=pictures
    )
    require_files(folder, truth)
    return truth
