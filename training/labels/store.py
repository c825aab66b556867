"""A folder of pseudo-labels in COCO's panoptic format, and what is needed to make and to trust them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from model.contract import reject_unknown
from model.encodings import decode_panoptic_png
from model.errors import ConfigError, LabelStoreError
from model.files import replace_file
from model.network.mask_transformer import STRIDE_PX
from training.choices import MERGE_RULES, MergeRule
from training.labels.clusters.codebook_recipe import CodebookConfig
from training.labels.index import write_instances, write_panoptic
from training.labels.masks.discovery_recipe import DiscoveryConfig
from training.labels.shards import Records

CONFIG_FILE = "label.json"
INDEX_FILE = "panoptic.json"
INSTANCES_FILE = "instances.json"
PANOPTIC_FOLDER = "panoptic"
CODEBOOK_FILE = "codebook.npz"
VIEWS_FILE = "views.npz"
SCAN_FILE = "scan.json"
FORMAT_VERSION = 2
_BINDING = {"photos", "photos_hash", "encoder_hash", "side_px", "cuts", "threshold", "proposals", "tokens", "centred",
            "faithful"}  # fmt: skip
"""What masks depend on."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig(CodebookConfig, DiscoveryConfig):
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
    merge: MergeRule = "improved"
    """What becomes of a stuff cluster that lies mostly inside masks, where there is no mask: `published` keeps it as
    stuff, `improved` ignores it."""
    stuff_crf: bool = False
    """Move the borders of stuff by a dense CRF, as STEGO's evaluation does; not for maps."""
    most_inside: float = 0.5
    """Share of a stuff cluster inside masks above which it does."""
    detector: str = ""
    """The sha256 of the network that found the masks, if one did."""
    note: str = ""
    """Where the photos come from, for the model card."""
    relabelled: str = ""
    """Hashes of the run that found the masks and the stuff, and of the labels that it learned from, if one did."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DiscoveryConfig.__post_init__(self)
        if self.side_px % STRIDE_PX:
            raise ConfigError(f"side_px must be a multiple of {STRIDE_PX}, got {self.side_px}")
        if self.merge not in MERGE_RULES:
            raise ConfigError(f"merge must be one of {', '.join(MERGE_RULES)}, got {self.merge!r}")
        if not 0.0 <= self.most_inside <= 1.0:
            raise ConfigError(f"most_inside must lie in 0..1, got {self.most_inside}")
        if self.stuff_crf and self.stuff == "maps":
            raise ConfigError("a dense CRF on stuff needs similarities, and maps have none: leave it out")
        if bool(self.detector) != (self.proposals == "detector"):
            raise ConfigError("a detector goes with its proposals, and with no others")
        if bool(self.maps) != (self.stuff == "maps"):
            raise ConfigError("a folder of stuff maps goes with stuff from maps, and with nothing else")


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
    def shards(self) -> Path:
        """The folder of panoptic PNGs, a folder a shard."""
        return self.folder / PANOPTIC_FOLDER

    @property
    def views(self) -> Path:
        """What a vote's views of the features are made with."""
        return self.folder / VIEWS_FILE

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
        return (self.folder / INDEX_FILE).is_file()

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
        elif self.folder.exists() and any(entry.name not in ("features", SCAN_FILE) for entry in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and no label store: choose another --out")
        with replace_file(path) as sibling:
            content = {"format_version": FORMAT_VERSION, **asdict(config)}
            sibling.write_text(json.dumps(content, indent=2) + "\n")

    def read_config(self) -> LabelConfig:
        path = self.folder / CONFIG_FILE
        try:
            content = json.loads(path.read_bytes())
            if (version := content.pop("format_version", 1)) != FORMAT_VERSION:
                raise ConfigError(f"its format is version {version}, not {FORMAT_VERSION}: label its photos anew")
            reject_unknown(content, LabelConfig)
            return LabelConfig(**content)
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise LabelStoreError(f"{self.folder} is no label store that can be read: {error}") from error

    def write_index(self, config: LabelConfig, records: Records) -> None:
        """COCO's instances and panoptic JSON; the latter last, so that a store with an index is whole."""
        write_instances(self.folder / INSTANCES_FILE, records, config.thing_clusters)
        write_panoptic(self.folder / INDEX_FILE, records, config.thing_clusters, config.stuff_clusters)

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

    def read_masks(self) -> dict[str, list[dict[str, Any]]]:
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


def read_label(path: Path) -> Int32[np.ndarray, "H W"]:
    """The segment ids of a stored PNG. Raises LabelStoreError if it is missing or broken."""
    try:
        return decode_panoptic_png(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LabelStoreError(f"{path} is no panoptic label: {error}") from error
