"""Segmentation of photos to files: COCO datasets, label maps, overlays, GeoJSON. An interrupted run continues."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import UInt8

from model.contract import NETWORK_FILE, Contract, SegmentFormat, Task
from model.errors import ConfigError, InputError
from model.export.predictor import ArtifactPredictor
from model.files import append_text, list_by_suffix, replace_file
from model.formats.coco import MaskFormat, to_coco_annotation, to_coco_dataset, to_coco_instances, to_geojson_features
from model.formats.image_files import encode_overlay, encode_panoptic_png
from model.images import SUFFIXES, read_image
from model.postprocessing.panoptic import Segmentation
from model.progress import track

_FORMAT_OF_SUFFIX: dict[str, SegmentFormat] = {
    ".png": "png",
    ".jpg": "overlay",
    ".jpeg": "overlay",
    ".geojson": "geojson",
    ".json": "coco-instances",
}
_COCO_FILES = {"coco-panoptic": "panoptic.json", "coco-instances": "instances.json", "coco-polygons": "instances.json"}
_FILE_SUFFIXES = {"coco-panoptic": ".png", "png": ".png", "overlay": ".overlay.jpg", "geojson": ".geojson"}
_PANOPTIC_FOLDER = "panoptic"
_JOURNAL_FILE = ".segment.jsonl"
_JOURNAL_VERSION = 1


def choose_format(out: Path, given: SegmentFormat | None) -> SegmentFormat:
    """Return the given format, or that of the output's suffix. Raises ConfigError if no format has this suffix."""
    found = given or _FORMAT_OF_SUFFIX.get(out.suffix.lower())
    if found is None:
        raise ConfigError(
            f"{out}: no format has the suffix {out.suffix!r}: give --format {' | '.join(get_args(SegmentFormat))}, or "
            f"an --out with one of {', '.join(_FORMAT_OF_SUFFIX)}"
        )
    return found


def list_inputs(paths: Sequence[Path], out: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """List the photos in these files and folders, and count the other files by suffix.

    The name of a photo is its path below the common folder, with forward slashes. Raises ConfigError if the output
    would be one of the photos.
    """
    photos: list[Path] = []
    other_files: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise ConfigError(f"--out {out} is inside {path}: its files would be taken for photos")
            found, others = list_by_suffix(path, SUFFIXES)
            photos += found
            other_files.update(others)
        else:
            photos.append(path)
            if out.resolve() == path.resolve():
                raise ConfigError(f"--out {out} is a photo to segment: choose another name")
    photos = list(dict.fromkeys(photos))
    if not photos:
        raise ConfigError(f"{', '.join(map(str, paths))}: no photo")
    is_folder = len(paths) == 1 and paths[0].is_dir()
    root = paths[0] if is_folder else Path(os.path.commonpath([photo.absolute().parent for photo in photos]))
    return {Path(os.path.relpath(photo, root)).as_posix(): photo for photo in photos}, other_files


def segment_photos(
    predictor: ArtifactPredictor, photos: dict[str, Path], out: Path, form: SegmentFormat, task: Task
) -> dict[str, Any]:
    """Segment photos by name, and return a summary; those that an earlier or interrupted run has segmented are kept.

    `out` is a JSON file or a folder for COCO instances, else a folder. Raises ConfigError if it is neither, was begun
    with other options, or if a photo would be overwritten, and OSError if it cannot be written.
    """
    is_file = form in ("coco-instances", "coco-polygons") and out.suffix.lower() == ".json"
    journal = out.with_name(f".{out.name}{_JOURNAL_FILE}") if is_file else out / _JOURNAL_FILE
    writer = _Writer(predictor=predictor, folder=out / _PANOPTIC_FOLDER if form == "coco-panoptic" else out, form=form)
    if not is_file:
        _check_folder(out, writer, photos)
    records, skipped = _read_journal(journal, _describe(predictor, form, task)), []
    for name, path in track(list(photos.items()), "segment"):
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            if writer.is_done(records.get(name), stamp):
                continue
            records[name] = {"name": name, "stamp": stamp, **writer.write(name, path, task)}
        except (InputError, FileNotFoundError) as error:
            records.pop(name, None)
            reason = "not found" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{path}: ")
            skipped.append(f"{name}: {reason}")
            continue
        append_text(journal, json.dumps(records[name]) + "\n")
    done = {name: records[name] for name in sorted(photos) if name in records}
    if form in _COCO_FILES:
        _write_coco(out if is_file else out / _COCO_FILES[form], predictor.contract, done)
    if is_file:
        journal.unlink()
    return {
        "out": str(out),
        "format": form,
        "task": task,
        "photos": len(done),
        "segments": sum(record["segments"] for record in done.values()),
        "skipped": skipped,
    }


def encode_segmentation(
    image: UInt8[np.ndarray, "H W 3"], segmentation: Segmentation, contract: Contract, form: SegmentFormat
) -> bytes:
    """Return the file of one photo: an overlay, GeoJSON, or else COCO's panoptic PNG."""
    if form == "overlay":
        return encode_overlay(image, segmentation)
    if form == "geojson":
        features = to_geojson_features(segmentation)
        return json.dumps({"type": "FeatureCollection", "features": features}, default=np.ndarray.tolist).encode()
    return encode_panoptic_png(segmentation.label_map)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Segments photos and writes their files, if the format has a file for each photo."""

    predictor: ArtifactPredictor
    folder: Path
    form: SegmentFormat

    def is_done(self, record: dict[str, Any] | None, stamp: list[int]) -> bool:
        """Whether a photo was segmented as it is now."""
        if record is None or record["stamp"] != stamp:
            return False
        return self.form not in _FILE_SUFFIXES or self.path(record["name"]).is_file()

    def write(self, name: str, path: Path, task: Task) -> dict[str, Any]:
        """Return size, number of segments and COCO annotations of a photo. Raises InputError if it is unreadable."""
        image, contract = read_image(path).image, self.predictor.contract
        segmentation = self.predictor.segment(image, task)
        annotations: list[dict[str, Any]] = []
        match self.form:
            case "coco-panoptic":
                annotations = [to_coco_annotation(segmentation, contract, 0, f"{name}{_FILE_SUFFIXES[self.form]}")]
            case "coco-instances" | "coco-polygons":
                mask_format: MaskFormat = "rle" if self.form == "coco-instances" else "polygons"
                annotations = to_coco_instances(segmentation, contract, mask_format)
        if self.form in _FILE_SUFFIXES:
            replace_file(self.path(name), encode_segmentation(image, segmentation, contract, self.form))
        size = {"height": image.shape[0], "width": image.shape[1]}
        return {**size, "segments": len(segmentation.segments), "annotations": annotations}

    def path(self, name: str) -> Path:
        """The file of a photo, if the format has one."""
        return self.folder / f"{name}{_FILE_SUFFIXES.get(self.form, '')}"


def _check_folder(out: Path, writer: _Writer, photos: dict[str, Path]) -> None:
    """Raise ConfigError if the output is named as a file, or if a photo would be overwritten."""
    if out.suffix.lower() in _FORMAT_OF_SUFFIX and not out.is_dir():
        raise ConfigError(f"--out {out} must be a folder for several files of format {writer.form}: give another name")
    originals = {path.resolve() for path in photos.values()}
    outputs = map(writer.path, photos if writer.form in _FILE_SUFFIXES else ())
    if overwritten := [each for each in outputs if each.resolve() in originals]:
        raise ConfigError(f"{overwritten[0]} is a photo to segment and would be overwritten: choose another --out")


def _describe(predictor: ArtifactPredictor, form: SegmentFormat, task: Task) -> dict[str, Any]:
    """Return what results depend on, besides the photos."""
    contract = predictor.contract
    categories = {str(cluster): [category.id, category.name] for cluster, category in contract.categories.items()}
    return {
        "format_version": _JOURNAL_VERSION,
        "format": form,
        "task": task,
        "detail": predictor.detail,
        "merge_clusters": predictor.merge_clusters,
        "network": contract.files.get(NETWORK_FILE, ""),
        "categories": categories,
        "examples": sha256(contract.examples.embeddings.encode()).hexdigest() if contract.examples else None,
    }


def _read_journal(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the records of an earlier run by name, or begin a journal. Raises ConfigError if it has other settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                if not line.endswith("\n"):  # the run was killed while it wrote
                    break
                records.append(json.loads(line))
    if records and records[0] != settings:
        raise ConfigError(f"{path} is of a run with another artifact, other names or other options: give another --out")
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records or [settings]))
    return {record["name"]: record for record in records[1:]}


def _write_coco(path: Path, contract: Contract, records: dict[str, dict[str, Any]]) -> None:
    images, annotations = [], list[dict[str, Any]]()
    for image_id, (name, record) in enumerate(records.items(), start=1):
        images.append({"id": image_id, "file_name": name, "height": record["height"], "width": record["width"]})
        annotations += [{**each, "image_id": image_id} for each in record["annotations"]]
    replace_file(path, json.dumps(to_coco_dataset(contract, images, annotations)))
