"""Provenance of a run: encoder, photos, labels and the commit of the code."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from model.checkpoints.dino import describe_encoder_origin
from model.checkpoints.runs import ENCODER_STEM
from model.checkpoints.state_dicts import DEFAULT_CACHE, fetch_file
from model.errors import CheckpointError
from model.files import atomic_write, hash_file
from training.data.encoders import read_encoder_origin
from training.data.label_config import PseudoLabelConfig, to_json

_GIT_TIMEOUT_S = 10.0
_MACHINE_PATHS = ("photos", "encoder")
"""Prefixes of label options that hold paths of this machine, or that have an entry of their own."""


def copy_encoder(source: str, expected_hash: str, run: Path) -> str:
    """Copy the encoder file into the run, unless it is there, and return its name in the run.

    Raises CheckpointError if the file has another hash.
    """
    name = f"{ENCODER_STEM}{Path(source).suffix}"
    if not (run / name).exists():
        with atomic_write(run / name) as sibling:
            shutil.copyfile(fetch_file(source, DEFAULT_CACHE), sibling)
    if hash_file(run / name) != expected_hash:
        raise CheckpointError(f"{run / name} is not the encoder that the labels were made with")
    return name


def make_provenance(labels: PseudoLabelConfig, num_photos: int) -> dict[str, Any]:
    """Describe encoder, photos and labels for run and artifact, without paths of this machine."""
    settings = {key: value for key, value in to_json(labels).items() if not key.startswith(_MACHINE_PATHS)}
    origin = read_encoder_origin(Path(labels.encoder)) or describe_encoder_origin(labels.encoder_hash)
    return {
        "encoder": {"sha256": labels.encoder_hash, "origin": origin},
        "photos": {"count": num_photos, "sha256": labels.photos_hash, "note": settings.pop("data_source")},
        "labels": settings,
    }


def git_commit(file: Path = Path(__file__)) -> str | None:
    """Return the git commit of the checkout that tracks a file, with `-dirty` appended if it has local changes.

    None if git is not installed or does not track the file, which may be installed inside an unrelated checkout.
    """
    is_tracked = ["ls-files", "--error-unmatch", file.name]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for arguments in (is_tracked, describe):
            command = ["git", "-C", str(file.parent), *arguments]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
