"""Options shared by all training runs, and those of self-training; free of torch, for the command line."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.option_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Precision = Literal["fp32", "bf16"]
InputKind = Literal["pixels", "features"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a training run that every network has."""

    out: Path
    """Folder of the run."""
    init_weights: Path | None = None
    """Run or artifact whose weights training starts from; layers of other shapes are initialized."""
    features: Path | None = None
    """Folder of the feature cache (default: LABELS/features)."""
    photos: Path | None = None
    """Folder of the labeled photos, if they have moved since."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to train on."""
    max_minutes: PositiveFloat = math.inf
    """Stop after this time; the same command continues."""
    prometheus_textfile: Path | None = None
    """File for the textfile collector of Prometheus' node_exporter; ends in .prom."""
    threads: PositiveInt = 2
    """CPU threads."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of every training run, whatever the network."""

    max_steps: PositiveInt = 3000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 8
    """Photos per step, over all processes."""
    learning_rate: PositiveFloat = 4e-4
    """Peak learning rate; the schedule scales it at each step."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; not applied to norms."""
    grad_clip_norm: PositiveFloat = 1.0
    """Maximum norm of the gradients of all parameters together."""
    clip_per_parameter: bool = False
    """Clip the gradient of each parameter on its own instead."""
    precision: Precision = "fp32"
    """Precision of the forward pass; weights, gradients and optimizer state stay fp32."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights, which the run stores; 0: store the weights themselves."""
    seed: NonNegativeInt = 0
    """Seed of initialization, sampling and augmentation."""
    checkpoint_interval: PositiveInt = 100
    """Steps between two checkpoints."""

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step; a schedule overrides it."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """Options of a round of self-training."""

    min_relative_score: Fraction = 0.5
    """Minimum score of an instance in the panoptic map in the first round, as a fraction of the highest score of its
    cluster, 0..1."""
    score_increment: Fraction = 0.05
    """Increase of the minimum score in each later round, 0..1."""
    force: bool = False
    """Write labels even if the predictions are less consistent than those of the previous round."""
