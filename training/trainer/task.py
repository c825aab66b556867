"""What one loop must know of the networks that it trains."""

from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from model.checkpoints.runs import RunInfo
from model.networks.mask_transformer import MaskDecoder
from model.networks.panoptic_cascade import PanopticCascade
from training.trainer.config import TrainConfig

IGNORE_INDEX = -1
"""Of a semantic target: nothing is asked there; 255, which files use, may be a cluster here."""


class TrainingBatch(Protocol):
    """Inputs and targets: a dataclass of tensors, and of tuples and dataclasses of them."""

    @property
    def photos(self) -> tuple[Path, ...]:
        """Named where a batch breaks a fit."""


class TrainingLosses(Protocol):
    """Weighted terms."""

    @property
    def total(self) -> Tensor:
        """Their sum, which is minimised."""

    def as_floats(self) -> dict[str, float]:
        """Every term, and the sum as `total`."""


BatchType = TypeVar("BatchType", bound=TrainingBatch)


class TrainingTask(Protocol[BatchType]):
    """A network and how it is taught: all that differs from one fit to another."""

    @property
    def recipe(self) -> TrainConfig: ...

    @property
    def card(self) -> RunInfo:
        """Of the run, at step 0."""

    @property
    def module(self) -> MaskDecoder | PanopticCascade:
        """The trained part, whose weights make the run."""

    def make_optimiser(self) -> Optimizer: ...

    def schedule(self, step: int) -> float:
        """The share of the recipe's learning rate at a step."""

    def read(self, first: int, count: int) -> BatchType:
        """Samples `first` to `first + count` of an endless walk that is always the same; called from another thread."""

    def compute_losses(self, batch: BatchType, step: int) -> TrainingLosses:
        """What is drawn at random here hangs on the seed and the step alone."""

    def finish(self, module: nn.Module) -> None:
        """Put in order what is about to be written as a finished run."""
