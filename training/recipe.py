"""How a decoder is fitted; free of heavy imports, for the command line."""

from dataclasses import asdict, dataclass

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The recipe of a fit."""

    steps: int = 2500
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
    seed: int = 0
    checkpoint_every: int = 100
    """Steps."""

    def __post_init__(self) -> None:
        positive = {key: value for key, value in asdict(self).items() if key not in ("seed", "weight_decay", "warm_up")}
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if not 0.0 <= self.warm_up < 1.0:
            raise ConfigError(f"warm_up must lie in 0..1, got {self.warm_up}")


PRESETS = {
    "tiny": FitConfig(steps=4, batch=2, queries=8, layers=1, checkpoint_every=2),
    "cpu": FitConfig(),
}
"""`tiny` shows that everything turns; `cpu` takes about an hour on two cores."""
