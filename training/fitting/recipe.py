"""How a network is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Precision = Literal["fp32", "bf16"]
Inputs = Literal["pixels", "features"]
Targets = Literal["merged", "instances"]


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


@dataclass(frozen=True, kw_only=True)
class FitConfig(Recipe):
    """The recipe of a mask transformer's fit."""

    inputs: Inputs = "features"
    """An encoder's, computed once, or pixels, which it looks at in every step: on a GPU."""
    jitter: float = 0.4
    """Most that brightness, contrast and saturation of pixels change by."""
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises; it falls as a cosine afterwards."""
    queries: int = 64
    layers: int = 3
    paste_rate: float = 0.7
    """Share of the samples that receive objects of another photo."""
    pastes_alike: bool = False
    """Paste objects of clusters that the sample has, from photos that have them, where there are such."""
    crop_rate: float = 0.0
    """Share of the samples that show a window of the photo, half to all of the square's side, in its place."""
    targets: Targets = "merged"
    """Objects: what shows of them in the panoptic labels, or the store's whole masks, each counting by its score."""
    most_targets: int = 30
    """Whole masks a photo, best first."""
    doubt: float = 0.0
    """How much a label's lack of weight speaks for "none", 0..1: with 1, scores become the weights of labels."""
    drops_unknown: bool = False
    """Hold a query that matched nothing to "none" only where at least half of its mask is labelled (DropLoss)."""
    embeds: bool = False
    """Teach queries the whitened features of their objects, too: clusters can then be made anew without a fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("queries", "layers", "most_targets")
        self._require_shares("warm_up", "paste_rate", "crop_rate", "jitter", "doubt")
        for name, words in (("inputs", Inputs), ("targets", Targets)):
            if getattr(self, name) not in get_args(words):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(words))}, got {getattr(self, name)!r}")


PRESETS = {
    "tiny": FitConfig(steps=4, batch=2, queries=8, layers=1, checkpoint_every=2),
    "plain": FitConfig(),
    "cpu": FitConfig(
        targets="instances", doubt=1.0, crop_rate=0.25, drops_unknown=True, pastes_alike=True, embeds=True,
    ),
    "gpu": FitConfig(
        inputs="pixels", batch=64, steps=4000, precision="bf16", average_decay=0.999, crop_rate=1.0,
        targets="instances", drops_unknown=True, pastes_alike=True, embeds=True,
    ),
}  # fmt: skip
"""`tiny` shows that everything turns; `plain` learns what shows in the panoptic maps, each object alike; `cpu`, as the
bundled model, learns all masks by their scores, in about an hour on two cores; `gpu` does so on one large GPU."""
