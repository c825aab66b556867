"""Options shared by all training runs; free of torch, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Precision = Literal["fp32", "bf16"]
InputKind = Literal["pixels", "features"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of every training run, whatever the network."""

    max_steps: int = 3000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Photos per step, over all processes."""
    learning_rate: float = 4e-4
    """Peak learning rate; the schedule scales it at each step."""
    weight_decay: float = 0.05
    """Weight decay; not applied to norms."""
    grad_clip_norm: float = 1.0
    """Maximum norm of the gradients of all parameters together."""
    clip_per_parameter: bool = False
    """Clip the gradient of each parameter on its own instead."""
    precision: Precision = "fp32"
    """Precision of the forward pass; weights, gradients and optimizer state stay fp32."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which the run stores; 0: store the weights themselves."""
    seed: int = 0
    """Seed of initialization, sampling and augmentation."""
    checkpoint_interval: int = 100
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        self._require_positive("max_steps", "batch_size", "learning_rate", "grad_clip_norm", "checkpoint_interval")
        self._require_fraction("ema_decay")
        self._require_non_negative("seed", "weight_decay")
        self._require_choice("precision", Precision)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")

    def _require_non_negative(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def _require_fraction(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def _require_choice(self, name: str, choices: object) -> None:
        allowed = get_args(choices)
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
