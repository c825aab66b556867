"""Labelled pictures in COCO's panoptic format: what results are held against, never trained on."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from model.errors import LabelStoreError
from training.store import read_label

PANOPTIC_FILE = "panoptic.json"


@dataclass(frozen=True, kw_only=True)
class TruthPicture:
    """One labelled picture."""

    image_id: int
    path: Path
    label: Path
    segments: dict[int, int]
    """Segment id to COCO category id."""
    crowds: frozenset[int]
    """Segments that are groups."""

    def read_label_map(self, height: int, width: int) -> Int32[np.ndarray, "H W"]:
        """Raises LabelStoreError unless it is a panoptic PNG of this size."""
        label_map = read_label(self.label)
        if label_map.shape != (height, width):
            raise LabelStoreError(f"{self.label} has the shape {label_map.shape}, its photo {height, width}")
        return label_map


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A labelled set, its categories gathered into their supercategories, things first."""

    pictures: tuple[TruthPicture, ...]
    names: tuple[str, ...]
    """Supercategories; the first `things` of them are things."""
    things: int
    index: dict[int, int]
    """COCO category id to the place of its supercategory in `names`."""


def read_truth(folder: Path) -> Truth:
    """A folder with `panoptic.json` as COCO has it, the photos in `images/` and the PNGs in `panoptic/`.

    Raises LabelStoreError if something is missing, or there are fewer than two pictures.
    """
    try:
        content = json.loads((folder / PANOPTIC_FILE).read_bytes())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pictures = tuple(
            TruthPicture(
                image_id=annotation["image_id"],
                path=folder / "images" / files[annotation["image_id"]],
                label=folder / "panoptic" / annotation["file_name"],
                segments={each["id"]: each["category_id"] for each in annotation["segments_info"]},
                crowds=frozenset(each["id"] for each in annotation["segments_info"] if each.get("iscrowd")),
            )
            for annotation in sorted(content["annotations"], key=lambda each: int(each["image_id"]))
        )
        classes = {c["id"]: (not c["isthing"], c.get("supercategory") or c["name"]) for c in content["categories"]}
        index = {each: sorted(set(classes.values())).index(group) for each, group in classes.items()}
        if strangers := {c for each in pictures for c in each.segments.values()} - set(index):
            raise ValueError(f"categories {sorted(strangers)} are not listed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is no labelled set in COCO's panoptic format: {error!r}") from error
    missing = [str(path) for each in pictures for path in (each.path, each.label) if not path.is_file()]
    if missing:
        raise LabelStoreError(f"{folder} lacks {', '.join(missing[:3])}")
    if len(pictures) < 2:
        raise LabelStoreError(
            f"{folder} holds {len(pictures)} pictures: clusters are matched on others than are scored"
        )
    groups = sorted(set(classes.values()))
    names = tuple(name for _, name in groups)
    return Truth(pictures=pictures, names=names, things=sum(not is_stuff for is_stuff, _ in groups), index=index)
