"""Pseudo-labels to a run, for either network."""

import math
from pathlib import Path

import torch

from model.errors import BackendUnavailable, ConfigError
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.task import MaskTransformerTask
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.task import CascadeTask
from training.trainer.distributed import SINGLE_PROCESS, DistributedContext
from training.trainer.trainer import Trainer, TrainReport


def train(
    store: PseudoLabelDataset,
    features: Path,
    run: Path,
    recipe: MaskTransformerTrainConfig | CascadeTrainConfig,
    device: str = "cpu",
    *,
    start: Path | None = None,
    backbone: str = "",
    limit_s: float = math.inf,
    ranks: DistributedContext = SINGLE_PROCESS,
    metrics: Path | None = None,
) -> TrainReport:
    """Fit the recipe's network, from the weights of the run `start` if one is given, and leave a run.

    `backbone` are a published ResNet-50's weights for a cascade; `ranks` share every batch out among them; `metrics`
    is a file for Prometheus. See `Trainer.train` for the rest.
    Raises BackendUnavailable if there is no such device, and ConfigError if the network has no ResNet-50.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no CUDA device here: choose --device cpu")
    if backbone and getattr(recipe, "backbone", None) != "resnet50":
        raise ConfigError(f"{backbone}: weights of a ResNet-50 are for a cascade with one")
    match recipe:
        case MaskTransformerTrainConfig():
            transformer = MaskTransformerTask(store, features, run, recipe)
            return Trainer(transformer, run, device, start=start, ranks=ranks, metrics=metrics).train(limit_s)
        case CascadeTrainConfig():
            cascade = CascadeTask(store, features, recipe, backbone)
            return Trainer(cascade, run, device, start=start, ranks=ranks, metrics=metrics).train(limit_s)
