"""How a network is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Precision = Literal["fp32", "bf16"]
InputKind = Literal["pixels", "features"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every fit is told, whatever its network."""

    steps: int = 3000
    batch: int = 8
    """Photos a step."""
    learning_rate: float = 4e-4
    """The highest; a schedule says which share of it a step takes."""
    weight_decay: float = 0.05
    clip: float = 1.0
    """Largest norm of all gradients together."""
    is_clipped_each: bool = False
    """Hold the gradient of each parameter to that norm instead."""
    precision: Precision = "fp32"
    """Of the forward pass; weights, gradients and optimiser stay fp32."""
    average_decay: float = 0.0
    """The run holds an exponential moving average of the weights, of this decay; 0: the weights themselves."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps."""

    def __post_init__(self) -> None:
        self._require_positive("steps", "batch", "learning_rate", "clip", "checkpoint_every")
        self._require_shares("average_decay")
        self._require_not_negative("seed", "weight_decay")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def _require_shares(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")
