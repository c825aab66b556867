"""A folder of pseudo-labels in COCO's panoptic format, and what is needed to make and to trust them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from model.errors import ConfigError, LabelStoreError
from model.files import atomic_write
from model.formats.encoders import decode_panoptic_png
from model.networks.mask_transformer import MASK_STRIDE_PX
from model.validation import reject_unknown_keys
from training.choices import STUFF_MERGE_RULES, StuffMergeRule
from training.data.label_config import CodebookConfig, MaskDiscoveryConfig
from training.data.panoptic_labels import ImageRecord, ImageRecords

CONFIG_FILE = "label.json"
PANOPTIC_FILE = "panoptic.json"
INSTANCES_FILE = "instances.json"
PANOPTIC_FOLDER = "panoptic"
CODEBOOK_FILE = "codebook.npz"
PROJECTIONS_FILE = "views.npz"
SCAN_FILE = "scan.json"
FORMAT_VERSION = 2
_MASK_FIELDS = {
    "photos",
    "photos_hash",
    "encoder_hash",
    "side_px",
    "maskcut_n",
    "threshold",
    "proposals",
    "tokens",
    "maskcut_subtract_mean",
    "maskcut_reference_filters",
}
"""What masks depend on."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig(CodebookConfig, MaskDiscoveryConfig):
    """Everything a label depends on."""

    photos: str
    """The folder, absolute."""
    photos_hash: str
    """Over the names and bytes of all photos in it."""
    encoder: str
    """Path of its file, absolute."""
    maps: str = ""
    """Folder of stuff maps, absolute, if stuff comes as such."""
    codebook: str = ""
    """Digest of the codebook that was given; empty if one is fitted on these photos."""
    merge: StuffMergeRule = "improved"
    """What becomes of a stuff cluster that lies mostly inside masks, where there is no mask: `published` keeps it as
    stuff, `improved` ignores it."""
    stuff_crf: bool = False
    """Move the borders of stuff by a dense CRF, as STEGO's evaluation does; not for maps."""
    max_stuff_in_things: float = 0.5
    """Share of a stuff cluster inside masks above which it does."""
    detector: str = ""
    """The sha256 of the network that found the masks, if one did."""
    note: str = ""
    """Where the photos come from, for the model card."""
    teacher_hash: str = ""
    """Hashes of the run that found the masks and the stuff, and of the labels that it learned from, if one did."""

    def __post_init__(self) -> None:
        super().__post_init__()
        MaskDiscoveryConfig.__post_init__(self)
        if self.side_px % MASK_STRIDE_PX:
            raise ConfigError(f"side_px must be a multiple of {MASK_STRIDE_PX}, got {self.side_px}")
        if self.merge not in STUFF_MERGE_RULES:
            raise ConfigError(f"merge must be one of {', '.join(STUFF_MERGE_RULES)}, got {self.merge!r}")
        if not 0.0 <= self.max_stuff_in_things <= 1.0:
            raise ConfigError(f"max_stuff_in_things must lie in 0..1, got {self.max_stuff_in_things}")
        if self.stuff_crf and self.stuff == "maps":
            raise ConfigError("a dense CRF on stuff needs similarities, and maps have none: leave it out")
        if bool(self.detector) != (self.proposals == "detector"):
            raise ConfigError("a detector goes with its proposals, and with no others")
        if bool(self.maps) != (self.stuff == "maps"):
            raise ConfigError("a folder of stuff maps goes with stuff from maps, and with nothing else")


@dataclass(frozen=True, kw_only=True)
class LabeledPhoto:
    """A labelled photo."""

    path: Path
    digest: str
    label: Path
    categories: dict[int, int]
    """Segment id to category, as in the PNG at `label`."""


@dataclass(frozen=True)
class PseudoLabelDataset:
    """The folder's layout."""

    folder: Path

    @property
    def codebook(self) -> Path:
        return self.folder / CODEBOOK_FILE

    @property
    def shards(self) -> Path:
        """The folder of panoptic PNGs, a folder a shard."""
        return self.folder / PANOPTIC_FOLDER

    @property
    def views(self) -> Path:
        """What a vote's views of the features are made with."""
        return self.folder / PROJECTIONS_FILE

    @property
    def scan(self) -> Path:
        """What was seen of the photos."""
        return self.folder / SCAN_FILE

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def is_finished(self) -> bool:
        """Whether every photo was labelled."""
        return (self.folder / PANOPTIC_FILE).is_file()

    def masks(self, digest: str) -> Path:
        return self.folder / "masks" / f"{digest}.npz"

    def lock_config(self, config: PseudoLabelConfig) -> None:
        """Make the folder this configuration's.

        Until there is a codebook, what only concerns the codebook may still be changed.
        Raises ConfigError if the folder is another configuration's, or no label store.
        """
        path = self.folder / CONFIG_FILE
        if path.exists():
            stored, given = asdict(self.read_config()), asdict(config)
            binding = (set(stored) if self.codebook.exists() else _MASK_FIELDS) - {"encoder"}
            if changed := sorted(key for key in binding if stored[key] != given[key]):
                raise ConfigError(
                    f"{self.folder} holds labels made otherwise ({', '.join(changed)} differ): choose another --out"
                )
        elif self.folder.exists() and any(entry.name not in ("features", SCAN_FILE) for entry in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and no label store: choose another --out")
        with atomic_write(path) as sibling:
            content = {"format_version": FORMAT_VERSION, **asdict(config)}
            sibling.write_text(json.dumps(content, indent=2) + "\n")

    def read_config(self) -> PseudoLabelConfig:
        path = self.folder / CONFIG_FILE
        try:
            content = json.loads(path.read_bytes())
            if (version := content.pop("format_version", 1)) != FORMAT_VERSION:
                raise ConfigError(f"its format is version {version}, not {FORMAT_VERSION}: label its photos anew")
            reject_unknown_keys(PseudoLabelConfig, content)
            return PseudoLabelConfig(**content)
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise LabelStoreError(f"{self.folder} is no label store that can be read: {error}") from error

    def write_index(self, config: PseudoLabelConfig, records: ImageRecords) -> None:
        """COCO's instances and panoptic JSON; the latter last, so that a store with an index is whole."""
        write_coco_instances(self.folder / INSTANCES_FILE, records, config.thing_clusters)
        write_coco_panoptic(self.folder / PANOPTIC_FILE, records, config.thing_clusters, config.stuff_clusters)

    def read_photos(self) -> list[LabeledPhoto]:
        """Every labelled photo, in the index's order. Raises LabelStoreError unless labelling was finished."""
        photos = Path(self.read_config().photos)
        try:
            content = json.loads((self.folder / PANOPTIC_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise LabelStoreError(
                f"{self.folder} has no finished labels ({error}): run `useg-train label` again"
            ) from error
        return [
            LabeledPhoto(
                path=photos / image["file_name"],
                digest=image["sha256"],
                label=self.folder / PANOPTIC_FOLDER / annotation["file_name"],
                categories={segment["id"]: segment["category_id"] for segment in annotation["segments_info"]},
            )
            for image, annotation in zip(content["images"], content["annotations"], strict=True)
        ]

    def read_instances(self) -> dict[str, list[dict[str, Any]]]:
        """The whole masks of each photo, by its hash, as entries of COCO's instances JSON; they may overlap.

        Raises LabelStoreError if there are none to read.
        """
        path = self.folder / INSTANCES_FILE
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise LabelStoreError(f"{path} is no list of masks ({error}): run `useg-train label` again") from error
        digests = {image["id"]: image["sha256"] for image in content["images"]}
        masks: dict[str, list[dict[str, Any]]] = {digest: [] for digest in digests.values()}
        for annotation in content["annotations"]:
            masks[digests[annotation["image_id"]]].append(annotation)
        return masks


def read_label_map(path: Path) -> Int32[np.ndarray, "H W"]:
    """The segment ids of a stored PNG. Raises LabelStoreError if it is missing or broken."""
    try:
        return decode_panoptic_png(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LabelStoreError(f"{path} is no panoptic label: {error}") from error


def write_coco_panoptic(path: Path, records: Iterable[ImageRecord], thing_clusters: int, stuff_clusters: int) -> None:
    """COCO's panoptic JSON; `records` is gone through twice, and never held."""
    annotations = (
        {"image_id": number, "file_name": record.file_name, "segments_info": record.segments}
        for number, record in enumerate(records, start=1)
    )
    categories = [_coco_category(each, "thing", each) for each in range(1, thing_clusters + 1)]
    categories += [_coco_category(thing_clusters + each, "stuff", each) for each in range(1, stuff_clusters + 1)]
    _stream_json(path, {"images": _coco_images(records), "annotations": annotations, "categories": categories})


def write_coco_instances(path: Path, records: Iterable[ImageRecord], thing_clusters: int) -> None:
    """COCO's instances JSON; a mask has a score where whatever found it gave one."""
    described = ((number, entry) for number, record in enumerate(records, start=1) for entry in record.instances)
    annotations = ({"id": place, "image_id": number, **entry} for place, (number, entry) in enumerate(described, 1))
    categories = [_coco_category(each, "thing", each) for each in range(1, thing_clusters + 1)]
    _stream_json(path, {"images": _coco_images(records), "annotations": annotations, "categories": categories})


def _coco_images(records: Iterable[ImageRecord]) -> Iterator[dict[str, Any]]:
    for number, photo in enumerate((record.photo for record in records), start=1):
        yield {
            "id": number,
            "file_name": photo.name,
            "height": photo.height,
            "width": photo.width,
            "sha256": photo.digest,
        }


def _coco_category(category: int, kind: str, number: int) -> dict[str, Any]:
    name = f"{kind} {number}"
    return {"id": category, "name": name, "supercategory": name, "isthing": int(kind == "thing")}


def _stream_json(path: Path, lists: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """A JSON object of lists, entry by entry: memory does not grow with their length."""
    with atomic_write(path) as sibling, sibling.open("w", encoding="utf-8") as stream:
        for opening, (key, entries) in zip(chain("{", repeat(", ")), lists.items(), strict=False):
            stream.write(f'{opening}"{key}": [')
            for comma, entry in zip(chain([""], repeat(", ")), entries, strict=False):
                stream.write(comma + json.dumps(entry))
            stream.write("]")
        stream.write("}")
