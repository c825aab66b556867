"""How a network is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
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
    seed: int = 0
    checkpoint_every: int = 100
    """Steps."""

    def __post_init__(self) -> None:
        self._require_positive("steps", "batch", "learning_rate", "clip", "checkpoint_every")
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


@dataclass(frozen=True, kw_only=True)
class FitConfig(Recipe):
    """The recipe of a mask transformer's fit."""

    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises; it falls as a cosine afterwards."""
    queries: int = 64
    layers: int = 3
    paste_rate: float = 0.7
    """Share of the samples that receive objects of another photo."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("queries", "layers")
        self._require_shares("warm_up", "paste_rate")


PRESETS = {
    "tiny": FitConfig(steps=4, batch=2, queries=8, layers=1, checkpoint_every=2),
    "cpu": FitConfig(),
}
"""`tiny` shows that everything turns; `cpu` takes about an hour on two cores."""
