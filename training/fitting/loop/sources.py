"""What a fit is made from: the encoder beside the run, and where it, the photos and the labels come from."""

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.files import hash_file, replace_file
from model.run import ENCODER_STEM
from model.weights.checkpoints import DEFAULT_CACHE, describe_encoder, fetch
from training.labels.store import LabelConfig


def keep_encoder(source: str, expected_hash: str, run: Path) -> str:
    """Copy the encoder into the run, once; returns its name there. Raises CheckpointError if it has changed."""
    name = f"{ENCODER_STEM}{Path(source).suffix}"
    if not (run / name).exists():
        with replace_file(run / name) as sibling:
            shutil.copyfile(fetch(source, DEFAULT_CACHE), sibling)
    if hash_file(run / name) != expected_hash:
        raise CheckpointError(f"{run / name} is not the encoder that the labels were made with")
    return name


def describe_sources(labels: LabelConfig, photos: int) -> dict[str, Any]:
    """The provenance that goes into run and artifact: no paths of this machine."""
    here = ("photos", "encoder", "maps")
    settings = {key: value for key, value in asdict(labels).items() if not key.startswith(here)}
    return {
        "encoder": {"sha256": labels.encoder_hash, "origin": describe_encoder(labels.encoder_hash)},
        "photos": {"count": photos, "sha256": labels.photos_hash, "note": settings.pop("note")},
        "labels": settings,
    }


def are_same_sources(stored: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two provenances are one; a setting of labels younger than what was stored had its default then."""
    defaults = {entry.name: entry.default for entry in fields(LabelConfig)}
    settings: dict[str, Any] = stored.get("labels", {})
    younger = {name: defaults[name] for name in given["labels"] if name not in settings}
    return {**stored, "labels": younger | settings} == given
