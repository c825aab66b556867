"""Selects a labeled dataset by folder and format, as the command line does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from model.errors import ConfigError
from training.evaluation.datasets.coco import CocoKind, find_coco_file, read_coco
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.datasets.published import read_cityscapes, read_coco_stuff, read_voc_boxes, read_voc_masks
from training.evaluation.datasets.taxonomy import ClassGrouping

DatasetFormat = Literal[
    "panoptic", "instances", "coco", "coco-instances", "coco-stuff", "cityscapes", "voc-masks", "voc-boxes"
]  # fmt: skip
"""Layout of a dataset; `panoptic` and `instances` are single files in COCO's formats, the others published layouts."""
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
