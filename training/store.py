"""A folder of pseudo-labels in COCO's panoptic format, and what is needed to make and to trust them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32

from model.contract import reject_unknown
from model.encodings import decode_panoptic_png, encode_panoptic_png
from model.errors import ConfigError, LabelStoreError
from model.files import replace_file
from model.network.mask_transformer import STRIDE_PX
from training.merge import Labelled
from training.photos import PhotoFile

CONFIG_FILE = "label.json"
INDEX_FILE = "panoptic.json"
PANOPTIC_FOLDER = "panoptic"
CODEBOOK_FILE = "codebook.npz"
_BINDING = {"photos", "photos_hash", "encoder_hash", "side_px", "cuts", "threshold"}
"""What masks depend on."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Everything a label depends on."""

    photos: str
    """The folder, absolute."""
    photos_hash: str
    """Over the names and bytes of all photos in it."""
    encoder: str
    """Path of its file, absolute."""
    encoder_hash: str
    side_px: int = 448
    cuts: int = 3
    """Most masks a photo."""
    threshold: float = 0.3
    """Cosine above which two patches are near."""
    components: int = 64
    """Whitened dimensions."""
    thing_clusters: int = 64
    stuff_clusters: int = 27
    seed: int = 0
    note: str = ""
    """Where the photos come from, for the model card."""

    def __post_init__(self) -> None:
        for name in ("side_px", "cuts", "components", "thing_clusters", "stuff_clusters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if self.side_px % STRIDE_PX:
            raise ConfigError(f"side_px must be a multiple of {STRIDE_PX}, got {self.side_px}")
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold must lie between 0 and 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class StoredPhoto:
    """A labelled photo."""

    path: Path
    digest: str
    label: Path
    categories: dict[int, int]
    """Segment id to category, as in the PNG at `label`."""


@dataclass(frozen=True)
class LabelStore:
    """The folder's layout."""

    folder: Path

    @property
    def codebook(self) -> Path:
        return self.folder / CODEBOOK_FILE

    @property
    def features(self) -> Path:
        return self.folder / "features"

    def masks(self, digest: str) -> Path:
        return self.folder / "masks" / f"{digest}.npz"

    def claim(self, config: LabelConfig) -> None:
        """Make the folder this configuration's.

        Until there is a codebook, what only concerns the codebook may still be changed.
        Raises ConfigError if the folder is another configuration's, or no label store.
        """
        path = self.folder / CONFIG_FILE
        if path.exists():
            stored, given = asdict(self.read_config()), asdict(config)
            binding = (set(stored) if self.codebook.exists() else _BINDING) - {"encoder"}
            if changed := sorted(key for key in binding if stored[key] != given[key]):
                raise ConfigError(
                    f"{self.folder} holds labels made otherwise ({', '.join(changed)} differ): choose another --out"
                )
        elif self.folder.exists() and any(entry.name != "features" for entry in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and no label store: choose another --out")
        with replace_file(path) as sibling:
            sibling.write_text(json.dumps(asdict(config), indent=2) + "\n")

    def read_config(self) -> LabelConfig:
        path = self.folder / CONFIG_FILE
        try:
            content = json.loads(path.read_bytes())
            reject_unknown(content, LabelConfig)
            return LabelConfig(**content)
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise LabelStoreError(f"{self.folder} is no label store: {error}") from error

    def write_label(self, photo: PhotoFile, labelled: Labelled) -> dict[str, Any]:
        """Write the photo's PNG; returns its annotation in COCO's words."""
        path = self._label_path(photo.name)
        with replace_file(path) as sibling:
            sibling.write_bytes(encode_panoptic_png(labelled.label_map))
        segments = [
            _describe(labelled.label_map == each, each, category) for each, category in labelled.categories.items()
        ]
        file_name = path.relative_to(self.folder / PANOPTIC_FOLDER).as_posix()
        return {"file_name": file_name, "segments_info": segments}

    def write_index(self, config: LabelConfig, photos: list[PhotoFile], annotations: list[dict[str, Any]]) -> None:
        """The COCO panoptic JSON; written last, so that a store with an index is whole."""
        images = [
            {"id": index, "file_name": photo.name, "height": photo.height, "width": photo.width, "sha256": photo.digest}
            for index, photo in enumerate(photos, start=1)
        ]
        numbered = [{"image_id": index, **entry} for index, entry in enumerate(annotations, start=1)]
        names = [(each, f"thing {each}", 1) for each in range(1, config.thing_clusters + 1)]
        above = config.thing_clusters
        names += [(above + each, f"stuff {each}", 0) for each in range(1, config.stuff_clusters + 1)]
        categories = [{"id": each, "name": name, "supercategory": name, "isthing": flag} for each, name, flag in names]
        with replace_file(self.folder / INDEX_FILE) as sibling:
            sibling.write_text(json.dumps({"images": images, "annotations": numbered, "categories": categories}))

    def read_photos(self) -> list[StoredPhoto]:
        """Every labelled photo, in the index's order. Raises LabelStoreError unless labelling was finished."""
        photos = Path(self.read_config().photos)
        try:
            content = json.loads((self.folder / INDEX_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise LabelStoreError(
                f"{self.folder} has no finished labels ({error}): run `useg-train label` again"
            ) from error
        return [
            StoredPhoto(
                path=photos / image["file_name"],
                digest=image["sha256"],
                label=self.folder / PANOPTIC_FOLDER / annotation["file_name"],
                categories={segment["id"]: segment["category_id"] for segment in annotation["segments_info"]},
            )
            for image, annotation in zip(content["images"], content["annotations"], strict=True)
        ]

    def _label_path(self, name: str) -> Path:
        return self.folder / PANOPTIC_FOLDER / f"{name}.png"


def read_label(path: Path) -> Int32[np.ndarray, "H W"]:
    """The segment ids of a stored PNG. Raises LabelStoreError if it is missing or broken."""
    try:
        return decode_panoptic_png(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LabelStoreError(f"{path} is no panoptic label: {error}") from error


def _describe(mask: np.ndarray, segment_id: int, category: int) -> dict[str, Any]:
    bbox = list(cv2.boundingRect(mask.view(np.uint8)))
    return {"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": bbox, "iscrowd": 0}
