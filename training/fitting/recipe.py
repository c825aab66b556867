"""How a decoder is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The recipe of a fit."""

    steps: int = 3000
    batch: int = 8
    """Photos a step."""
    learning_rate: float = 4e-4
    weight_decay: float = 0.05
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises; it falls as a cosine afterwards."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    queries: int = 64
    layers: int = 3
    paste_rate: float = 0.7
    """Share of the samples that receive objects of another photo."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "clip", "queries", "layers", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        for name in ("warm_up", "paste_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")


PRESETS = {
    "tiny": FitConfig(steps=4, batch=2, queries=8, layers=1, checkpoint_every=2),
    "cpu": FitConfig(),
}
"""`tiny` shows that everything turns; `cpu` takes about an hour on two cores."""
