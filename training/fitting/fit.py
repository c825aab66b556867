"""Pseudo-labels to a run, for either network."""

from pathlib import Path

from training.fitting.recipe import FitConfig
from training.fitting.trainer import FitReport, Trainer
from training.fitting.transformer_trainee import TransformerTrainee
from training.labels.store import LabelStore


def fit(
    store: LabelStore, features: Path, run: Path, recipe: FitConfig, device: str = "cpu", *, start: Path | None = None
) -> FitReport:
    """Fit the recipe's network, from the weights of the run `start` if one is given, and leave a run.

    See `Trainer.train`.
    """
    return Trainer(TransformerTrainee(store, features, run, recipe), run, device, start=start).train()
