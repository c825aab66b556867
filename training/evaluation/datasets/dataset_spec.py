"""The folder layouts in which labelled sets are published, by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from model.errors import ConfigError
from training.choices import ClassGrouping, DatasetFormat
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
from training.evaluation.datasets.voc import read_voc_boxes, read_voc_masks

_COCO_SPLIT = "val2017"
_SPLIT = "val"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which labelled set."""

    folder: Path
    layout: DatasetFormat = "panoptic"
    """The first two are our own: `panoptic.json`, `images/` and `panoptic/`; `instances.json` and `images/`."""
    split: str | None = None
    """None is the validation split; our own layouts have none."""
    protocol: ClassGrouping = "supercategories"
    """Which classes, where a set in COCO's panoptic format leaves a choice."""

    def __post_init__(self) -> None:
        if self.layout in ("panoptic", "instances") and self.split:
            raise ConfigError(f"the layout {self.layout} has no splits, got {self.split!r}: choose another layout")
        if self.layout not in ("panoptic", "coco") and self.protocol != "supercategories":
            raise ConfigError(f"the layout {self.layout} has its own classes, got the protocol {self.protocol!r}")

    def read(self) -> GroundTruthDataset:
        """Raises LabelStoreError if it is not there in full."""
        match self.layout:
            case "panoptic":
                return read_panoptic_folder(self.folder, self.protocol)
            case "instances":
                return read_instances(self.folder, self.folder / "instances.json", self.folder / "images")
            case "coco":
                return read_coco_panoptic(self.folder, self.split or _COCO_SPLIT, self.protocol)
            case "coco-instances":
                return read_coco_instances(self.folder, self.split or _COCO_SPLIT)
            case "coco-stuff":
                return read_coco_stuff(self.folder, self.split or _COCO_SPLIT)
            case "cityscapes":
                return read_cityscapes(self.folder, self.split or _SPLIT)
            case "voc-masks":
                return read_voc_masks(self.folder, self.split or _SPLIT)
            case "voc-boxes":
                return read_voc_boxes(self.folder, self.split or _SPLIT)
            case "uvo":
                return read_uvo_frames(self.folder, self.split or _SPLIT)
            case "uvo-videos":
                return read_uvo_videos(self.folder, self.split or _SPLIT)
            case _:
                assert_never(self.layout)
