"""Labelled pictures in COCO's panoptic format: what results are held against, never trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from model.encodings import decode_panoptic_png
from model.errors import LabelStoreError

PANOPTIC_FILE = "panoptic.json"
INSTANCES_FILE = "instances_from_panoptic.json"


@dataclass(frozen=True, kw_only=True)
class TruthPicture:
    """One labelled picture."""

    image_id: int
    path: Path
    label: Path
    segments: tuple[dict[str, Any], ...]

    def read_label_map(self) -> Int32[np.ndarray, "H W"]:
        return decode_panoptic_png(self.label.read_bytes())


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A labelled set, its categories gathered into their supercategories, things first."""

    pictures: tuple[TruthPicture, ...]
    names: tuple[str, ...]
    """Supercategories; the first `things` of them are things."""
    things: int
    index: dict[int, int]
    """COCO category id to the place of its supercategory in `names`."""
    instances: Path


def read_truth(folder: Path) -> Truth:
    """A folder with `images/`, `panoptic/`, `panoptic.json` and `instances_from_panoptic.json`.

    Raises LabelStoreError if something is missing.
    """
    try:
        content = json.loads((folder / PANOPTIC_FILE).read_bytes())
        images = {image["id"]: image for image in content["images"]}
        categories = content["categories"]
        pictures = tuple(
            TruthPicture(
                image_id=annotation["image_id"],
                path=folder / "images" / images[annotation["image_id"]]["file_name"],
                label=folder / "panoptic" / annotation["file_name"],
                segments=tuple(annotation["segments_info"]),
            )
            for annotation in sorted(content["annotations"], key=lambda each: int(each["image_id"]))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{folder} is no labelled set in COCO's panoptic format: {error!r}") from error
    missing = [str(path) for each in pictures for path in (each.path, each.label) if not path.is_file()]
    if missing or not (folder / INSTANCES_FILE).is_file():
        raise LabelStoreError(f"{folder} lacks {', '.join(missing[:3]) or INSTANCES_FILE}")
    things, stuff = (sorted({c["supercategory"] for c in categories if c["isthing"] == flag}) for flag in (1, 0))
    names = (*things, *stuff)
    index = {c["id"]: names.index(c["supercategory"]) for c in categories}
    return Truth(pictures=pictures, names=names, things=len(things), index=index, instances=folder / INSTANCES_FILE)
