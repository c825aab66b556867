"""What a fit is made from: the encoder beside the run, and where it, the photos and the labels come from."""

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from model.checkpoints.dino import describe_encoder_origin
from model.checkpoints.runs import ENCODER_STEM
from model.checkpoints.state_dicts import DEFAULT_CACHE, fetch_file
from model.errors import CheckpointError
from model.files import atomic_write, hash_file
from training.data.label_config import PseudoLabelConfig, to_json


def copy_encoder(source: str, expected_hash: str, run: Path) -> str:
    """Copy the encoder into the run, once; returns its name there. Raises CheckpointError if it has changed."""
    name = f"{ENCODER_STEM}{Path(source).suffix}"
    if not (run / name).exists():
        with atomic_write(run / name) as sibling:
            shutil.copyfile(fetch_file(source, DEFAULT_CACHE), sibling)
    if hash_file(run / name) != expected_hash:
        raise CheckpointError(f"{run / name} is not the encoder that the labels were made with")
    return name


def make_provenance(labels: PseudoLabelConfig, photos: int) -> dict[str, Any]:
    """The provenance that goes into run and artifact: no paths of this machine."""
    here = ("photos", "encoder", "stuff_maps_dir")
    settings = {key: value for key, value in to_json(labels).items() if not key.startswith(here)}
    return {
        "encoder": {"sha256": labels.encoder_hash, "origin": describe_encoder_origin(labels.encoder_hash)},
        "photos": {"count": photos, "sha256": labels.photos_hash, "note": settings.pop("data_source")},
        "labels": settings,
    }


def is_same_provenance(stored: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two provenances are one; a setting of labels younger than what was stored had its default then."""
    defaults = {entry.name: entry.default for entry in fields(PseudoLabelConfig)}
    settings: dict[str, Any] = stored.get("labels", {})
    younger = {name: defaults[name] for name in given["labels"] if name not in settings}
    return {**stored, "labels": younger | settings} == given


_TIMEOUT_S = 10.0


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The git commit of the checkout that holds a file, `-dirty` behind it if anything there was changed since.

    None if git is absent, or does not know the file: it may be installed inside a checkout of something else.
    """
    git = shutil.which("git")
    if git is None or _ask(git, file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _ask(git, file, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _ask(git: str, file: Path, *words: str) -> str | None:
    try:
        asked = subprocess.run(
            [git, "-C", file.parent, *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
