"""Selects a labeled dataset by folder and format, as the command line does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, assert_never

from cyclopts import Parameter

from model.errors import ConfigError
from training.evaluation.datasets.cityscapes import read_cityscapes
from training.evaluation.datasets.coco import (
    read_coco_instances,
    read_coco_panoptic,
    read_coco_stuff,
    read_instances,
    read_uvo_frames,
    read_uvo_videos,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset, read_panoptic_folder
from training.evaluation.datasets.taxonomy import ClassGrouping
from training.evaluation.datasets.voc import read_voc_boxes, read_voc_masks

DatasetFormat = Literal[
    "panoptic",
    "instances",
    "coco",
    "coco-instances",
    "coco-stuff",
    "cityscapes",
    "voc-masks",
    "voc-boxes",
    "uvo",
    "uvo-videos",
]
"""Layout of a dataset's folder. The first two are our own: `panoptic.json` with `images/` and `panoptic/`, and
`instances.json` with `images/`. The others are the layouts in which the datasets are published."""
_COCO_SPLIT = "val2017"
_SPLIT = "val"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which labeled dataset to read."""

    folder: Annotated[Path, Parameter(name="--dataset")]
    """Folder of the labeled dataset."""
    format: DatasetFormat = "panoptic"
    """Layout of the folder: our own (panoptic: panoptic.json, images/, panoptic/; instances: instances.json, images/),
    or that of a published dataset."""
    split: str | None = None
    """Split of a published dataset (default: its validation split)."""
    classes: ClassGrouping = "supercategories"
    """Classes of a dataset in COCO's panoptic format: things and stuff by supercategory, or every thing by itself."""

    def __post_init__(self) -> None:
        if self.format in ("panoptic", "instances") and self.split:
            raise ConfigError(f"format {self.format} has no splits, got {self.split!r}: choose another format")
        if self.format not in ("panoptic", "coco") and self.classes != "supercategories":
            raise ConfigError(f"format {self.format} has fixed classes, got {self.classes!r}")

    def read(self) -> GroundTruthDataset:
        """Raises LabelStoreError if the dataset is incomplete or not in this format."""
        folder = self.folder.resolve()  # processes on other machines may have another working directory
        match self.format:
            case "panoptic":
                return read_panoptic_folder(folder, self.classes)
            case "instances":
                return read_instances(folder, folder / "instances.json", folder / "images")
            case "coco":
                return read_coco_panoptic(folder, self.split or _COCO_SPLIT, self.classes)
            case "coco-instances":
                return read_coco_instances(folder, self.split or _COCO_SPLIT)
            case "coco-stuff":
                return read_coco_stuff(folder, self.split or _COCO_SPLIT)
            case "cityscapes":
                return read_cityscapes(folder, self.split or _SPLIT)
            case "voc-masks":
                return read_voc_masks(folder, self.split or _SPLIT)
            case "voc-boxes":
                return read_voc_boxes(folder, self.split or _SPLIT)
            case "uvo":
                return read_uvo_frames(folder, self.split or _SPLIT)
            case "uvo-videos":
                return read_uvo_videos(folder, self.split or _SPLIT)
            case _:
                assert_never(self.format)
