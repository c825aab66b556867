"""A pseudo-label dataset on disk: COCO panoptic and instances JSON, and the files needed to make and extend them."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from model.errors import ConfigError, DatasetError
from model.files import atomic_write, replace_file
from model.formats.image_files import decode_panoptic_png
from model.progress import Progress
from model.validation import parse_versioned_json, to_versioned_json
from training.data.label_config import PseudoLabelConfig
from training.data.panoptic_labels import (
    Chunk,
    Dependencies,
    ImageLabel,
    ImageRecord,
    plan_chunks,
    remove_stale,
)
from training.data.photos import PhotoFile

logger = logging.getLogger(__name__)

CONFIG_FILE = "label.json"
PANOPTIC_FILE = "panoptic.json"
INSTANCES_FILE = "instances.json"
SCAN_FILE = "scan.json"
FORMAT_VERSION = 3
_MASK_FIELDS = {
    "photos_hash", "encoder_hash", "mask_source", "side_px", "proposals", "maskcut_n", "maskcut_tau",
    "maskcut_features", "maskcut_subtract_mean", "maskcut_reference_filters",
}  # fmt: skip
"""Fields that stored masks depend on."""
_LOCATIONS = {"photos", "encoder"}
_MAX_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class LabeledPhoto(PhotoFile):
    """A photo with a finished label."""

    label: Path
    """The panoptic PNG."""
    categories: dict[int, int]
    """Category of each segment id in the PNG."""


@dataclass(frozen=True)
class PseudoLabelDataset:
    """The dataset's folder: its layout, and reading and writing its files."""

    folder: Path
    photos_dir: Path | None = None
    """Folder of the photos, if they have moved since they were labeled."""

    @property
    def codebook(self) -> Path:
        return self.folder / "codebook.npz"

    @property
    def chunks_dir(self) -> Path:
        """Folder of panoptic PNGs, one subfolder per chunk."""
        return self.folder / "panoptic"

    @property
    def projections(self) -> Path:
        """Fitted feature projections of consensus masks."""
        return self.folder / "projections.npz"

    @property
    def scan(self) -> Path:
        """Cache of the photo scan."""
        return self.folder / SCAN_FILE

    @property
    def features(self) -> Path:
        """Default folder of the feature caches."""
        return self.folder / "features"

    @property
    def is_finished(self) -> bool:
        """Whether every photo is labeled."""
        return (self.folder / PANOPTIC_FILE).is_file()

    def proposals(self, digest: str) -> Path:
        """The mask proposals of the photo with that SHA-256."""
        return self.folder / "masks" / f"{digest}.npz"

    def lock_config(self, config: PseudoLabelConfig, photos: Sequence[PhotoFile] = ()) -> None:
        """Write the configuration; later calls must pass the same one, but photos and encoder may have moved.

        Until there is a codebook, options that only the codebook depends on may still change. `photos` are for the
        error message. Raises ConfigError if the folder has another configuration, or holds something else.
        """
        path = self.folder / CONFIG_FILE
        if path.exists():
            stored = self.read_config()
            bound = {field.name for field in fields(config)} if self.codebook.exists() else _MASK_FIELDS
            changed = {name for name in bound - _LOCATIONS if getattr(stored, name) != getattr(config, name)}
            if changed == {"photos_hash"}:
                raise ConfigError(self._describe_changed_photos(photos))
            if changed:
                raise ConfigError(
                    f"{self.folder} holds labels with other settings ({', '.join(sorted(changed))} differ): "
                    "choose another output folder"
                )
        elif self.folder.exists() and any(entry.name not in ("features", SCAN_FILE) for entry in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and holds no pseudo-labels: choose another output folder")
        replace_file(path, to_versioned_json(config, FORMAT_VERSION))

    def read_config(self) -> PseudoLabelConfig:
        """Raises DatasetError if the folder holds no pseudo-labels of this format version."""
        path = self.folder / CONFIG_FILE
        try:
            content = path.read_bytes()
            config = parse_versioned_json(PseudoLabelConfig, content, FORMAT_VERSION, "; run `useg label` again")
            return replace(config, photos=str(self.photos_dir.resolve())) if self.photos_dir else config
        except (OSError, ConfigError) as error:
            raise DatasetError(f"{self.folder} holds no readable pseudo-labels: {error}") from error

    def write_labels(
        self,
        config: PseudoLabelConfig,
        photos: Sequence[PhotoFile],
        dependencies: Dependencies,
        label: Callable[[PhotoFile], ImageLabel],
    ) -> Iterator[ImageRecord]:
        """Label photos chunk by chunk, skip complete chunks, and write the COCO files; returns the records.

        `dependencies` is what the labels depend on besides the photos; chunks with other dependencies are deleted.
        """
        chunks = plan_chunks(photos, dependencies)
        with Progress("labels", len(photos), unit="photo") as progress:
            for chunk in chunks:
                if not chunk.is_complete(self.chunks_dir):
                    chunk.write(self.chunks_dir, map(label, chunk.photos))
                progress.advance(len(chunk.photos))
        self.finish(config, chunks)
        return self.read_records(chunks)

    def read_records(self, chunks: Iterable[Chunk]) -> Iterator[ImageRecord]:
        """Yield the records of complete chunks. Raises DatasetError if one is missing or damaged."""
        return chain.from_iterable(chunk.read(self.chunks_dir) for chunk in chunks)

    def finish(self, config: PseudoLabelConfig, chunks: Sequence[Chunk]) -> None:
        """Write the COCO files of complete chunks and delete all other chunks."""

        def number_records() -> Iterator[tuple[int, ImageRecord]]:
            return enumerate(self.read_records(chunks), start=1)

        masks = ((image_id, entry) for image_id, record in number_records() for entry in record.instances)
        instances = ({"id": index, "image_id": image_id, **each} for index, (image_id, each) in enumerate(masks, 1))
        things = [_coco_category(each, "thing", each) for each in range(1, config.thing_clusters + 1)]
        content = {"images": _coco_images(number_records()), "annotations": instances, "categories": things}
        _stream_json(self.folder / INSTANCES_FILE, content)
        segments = (
            {"image_id": image_id, "file_name": record.file_name, "segments_info": record.segments}
            for image_id, record in number_records()
        )
        stuff = [
            _coco_category(config.thing_clusters + each, "stuff", each) for each in range(1, config.stuff_clusters + 1)
        ]
        content = {"images": _coco_images(number_records()), "annotations": segments, "categories": [*things, *stuff]}
        # Last, because its presence means that the dataset is finished.
        _stream_json(self.folder / PANOPTIC_FILE, content)
        remove_stale(self.chunks_dir, chunks)

    def read_photos(self) -> list[LabeledPhoto]:
        """Return every labeled photo, in the order of `panoptic.json`.

        Raises DatasetError if labeling has not finished.
        """
        photos = Path(self.read_config().photos)
        content = self._read_coco(PANOPTIC_FILE)
        if content["images"] and not (first := photos / content["images"][0]["file_name"]).is_file():
            logger.warning("%s does not exist: if the photos have moved, give --photos", first)
        return [
            LabeledPhoto(
                path=photos / image["file_name"],
                name=image["file_name"],
                digest=image["sha256"],
                height=image["height"],
                width=image["width"],
                label=self.chunks_dir / annotation["file_name"],
                categories={segment["id"]: segment["category_id"] for segment in annotation["segments_info"]},
            )
            for image, annotation in zip(content["images"], content["annotations"], strict=True)
        ]

    def read_instances(self) -> dict[str, list[dict[str, Any]]]:
        """Return the COCO annotations of each photo's unmerged masks by the photo's SHA-256; masks may overlap.

        Raises DatasetError if labeling has not finished.
        """
        content = self._read_coco(INSTANCES_FILE)
        digests = {image["id"]: image["sha256"] for image in content["images"]}
        masks: dict[str, list[dict[str, Any]]] = {digest: [] for digest in digests.values()}
        for annotation in content["annotations"]:
            masks[digests[annotation["image_id"]]].append(annotation)
        return masks

    def _describe_changed_photos(self, photos: Sequence[PhotoFile]) -> str:
        """Return an error message that names the photos that are not as they were labeled."""
        advice = f"label them in another folder, with --codebook {self.codebook} to keep the clusters"
        if not self.is_finished or not photos:
            return f"the photos are not those with which {self.folder} was started: {advice}"
        before = {image["file_name"]: image["sha256"] for image in self._read_coco(PANOPTIC_FILE)["images"]}
        now = {photo.name: photo.digest for photo in photos}
        kinds = {
            "added": [name for name in now if name not in before],
            "removed": [name for name in before if name not in now],
            "changed": [name for name in now if before.get(name, now[name]) != now[name]],
        }
        listed = [
            f"{len(names)} {kind} ({', '.join(names[:_MAX_NAMES])}{', …' if len(names) > _MAX_NAMES else ''})"
            for kind, names in kinds.items()
            if names
        ]
        return f"photos are not as {self.folder} has labeled them: {'; '.join(listed)}: {advice}"

    def _read_coco(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.folder} has no finished labels ({error}): run `useg label` again") from error
        if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
            raise DatasetError(f"{self.folder / name} is not a COCO file: run `useg label` again")
        return content


def read_label_map(path: Path) -> Int32[np.ndarray, "H W"]:
    """Return the segment ids in a panoptic PNG. Raises DatasetError if it is missing or damaged."""
    try:
        return decode_panoptic_png(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} is not a panoptic label: {error}") from error


def _coco_images(records: Iterable[tuple[int, ImageRecord]]) -> Iterator[dict[str, Any]]:
    for image_id, record in records:
        photo = record.photo
        size = {"height": photo.height, "width": photo.width}
        yield {"id": image_id, "file_name": photo.name, **size, "sha256": photo.digest}


def _coco_category(category: int, kind: str, number: int) -> dict[str, Any]:
    name = f"{kind} {number}"
    return {"id": category, "name": name, "supercategory": name, "isthing": int(kind == "thing")}


def _stream_json(path: Path, lists: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Write a JSON object of lists entry by entry, so that memory does not grow with their length."""
    with atomic_write(path) as sibling, sibling.open("w", encoding="utf-8") as stream:
        for opening, (key, entries) in zip(chain("{", repeat(", ")), lists.items(), strict=False):
            stream.write(f'{opening}"{key}": [')
            for comma, entry in zip(chain([""], repeat(", ")), entries, strict=False):
                stream.write(comma + json.dumps(entry))
            stream.write("]")
        stream.write("}")
