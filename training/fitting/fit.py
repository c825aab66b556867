"""Pseudo-labels to a run, for either network."""

import math
from pathlib import Path

import torch

from model.errors import BackendUnavailable, ConfigError
from training.fitting.cascade.recipe import CascadeRecipe
from training.fitting.cascade.trainee import CascadeTrainee
from training.fitting.loop.ranks import ALONE, Ranks
from training.fitting.loop.trainer import FitReport, Trainer
from training.fitting.transformer.recipe import FitConfig
from training.fitting.transformer.trainee import TransformerTrainee
from training.labels.store import LabelStore


def fit(
    store: LabelStore,
    features: Path,
    run: Path,
    recipe: FitConfig | CascadeRecipe,
    device: str = "cpu",
    *,
    start: Path | None = None,
    backbone: str = "",
    limit_s: float = math.inf,
    ranks: Ranks = ALONE,
    metrics: Path | None = None,
) -> FitReport:
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
        case FitConfig():
            transformer = TransformerTrainee(store, features, run, recipe)
            return Trainer(transformer, run, device, start=start, ranks=ranks, metrics=metrics).train(limit_s)
        case CascadeRecipe():
            cascade = CascadeTrainee(store, features, recipe, backbone)
            return Trainer(cascade, run, device, start=start, ranks=ranks, metrics=metrics).train(limit_s)
