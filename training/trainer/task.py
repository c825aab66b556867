"""The interface between the trainer and a network, and what all tasks share: samples, losses, provenance."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Int16, Int32
from torch import Tensor, nn
from torch.optim import Optimizer

from model.checkpoints.dino import describe_encoder_origin
from model.checkpoints.runs import ENCODER_STEM, RunInfo
from model.checkpoints.state_dicts import fetch_file
from model.errors import CheckpointError
from model.files import hash_file, replace_file
from model.networks.mask_transformer import MaskDecoder
from model.networks.panoptic_cascade import PanopticCascade
from training.data.dataset import LabeledPhoto
from training.data.encoders import read_encoder_origin
from training.data.label_config import PseudoLabelConfig
from training.trainer.config import TrainConfig

IGNORE_INDEX = -1
"""Value of a semantic target that no loss counts. Not 255, which may be a cluster."""
_GIT_TIMEOUT_S = 10.0
_MACHINE_PATHS = ("photos", "encoder")
"""Prefixes of label options that hold paths of this machine, or that have an entry of their own."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Inputs and targets: tensors, and tuples and dataclasses of tensors."""

    photos: tuple[Path, ...]
    """Paths of the photos, for error messages."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a step computes."""

    terms: Mapping[str, Tensor]
    """Weighted loss terms, whose sum the optimizer minimizes."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Values that are only logged."""

    @property
    def total(self) -> Tensor:
        return sum(self.terms.values(), start=torch.zeros(()))

    def as_floats(self) -> dict[str, float]:
        """Return every logged value by name, with the sum as `total`."""
        logged = {**self.terms, **self.metrics, "total": self.total}
        return {name: float(value.detach()) for name, value in logged.items()}


BatchType = TypeVar("BatchType", bound=TrainingBatch)


class TrainingTask(Protocol[BatchType]):
    """A network with its data, losses, optimizer and schedule: all that differs between two training runs."""

    config: TrainConfig
    run_info: RunInfo
    """Description of the run at step 0."""
    module: MaskDecoder | PanopticCascade
    """The trained part, whose weights are stored in the run."""

    def make_optimizer(self) -> Optimizer: ...

    def load_batch(self, first: int, count: int) -> BatchType:
        """Load samples `first` to `first + count` of an endless, reproducible sequence; called from another thread."""

    def compute_losses(self, batch: BatchType, step: int) -> Losses:
        """Run a forward pass. Random choices depend only on the seed and the step."""

    def on_train_end(self, module: nn.Module) -> None:
        """Adjust the final weights before they are saved, for example batch-norm statistics."""
        return


@dataclass(frozen=True, kw_only=True)
class PhotoSampler:
    """An endless sequence of photos in random order, a new permutation each epoch.

    Sample n depends only on the seed and on n, so a resumed run sees the same samples.
    """

    photos: Sequence[LabeledPhoto]
    seed: int

    def sample(self, first: int, count: int) -> tuple[tuple[LabeledPhoto, ...], tuple[np.random.Generator, ...]]:
        """Return photos `first` to `first + count` of the sequence, and a generator for the augmentation of each."""
        positions = [divmod(index, len(self.photos)) for index in range(first, first + count)]
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.photos)) for epoch, _ in positions
        }
        photos = tuple(self.photos[orders[epoch][position]] for epoch, position in positions)
        return photos, tuple(np.random.default_rng((self.seed, *each)) for each in positions)


def make_semantic_map(
    photo: LabeledPhoto, label_map: Int32[np.ndarray, "h w"], thing_clusters: int
) -> Int16[np.ndarray, "h w"]:
    """Convert segment ids of a photo to 0 for things, s for stuff cluster s, IGNORE_INDEX for other pixels."""
    semantic = np.full(label_map.shape, IGNORE_INDEX, np.int16)
    for segment, category in photo.categories.items():
        semantic[label_map == segment] = max(0, category - thing_clusters)
    return semantic


def copy_encoder(source: str, expected_hash: str, run: Path) -> str:
    """Copy the encoder file into the run, unless it is there, and return its name in the run.

    Raises CheckpointError if the file has another hash.
    """
    name = f"{ENCODER_STEM}{Path(source).suffix}"
    if not (run / name).exists():
        replace_file(run / name, fetch_file(source).read_bytes())
    if hash_file(run / name) != expected_hash:
        raise CheckpointError(f"{run / name} is not the encoder that the labels were made with")
    return name


def make_provenance(labels: PseudoLabelConfig, num_photos: int) -> dict[str, Any]:
    """Describe encoder, photos and labels for run and artifact, without paths of this machine."""
    settings = {key: value for key, value in asdict(labels).items() if not key.startswith(_MACHINE_PATHS)}
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
