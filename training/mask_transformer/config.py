"""How a mask transformer is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError
from training.trainer.config import InputKind, TrainConfig

TargetSource = Literal["merged", "instances"]


@dataclass(frozen=True, kw_only=True)
class MaskTransformerTrainConfig(TrainConfig):
    """The recipe of a mask transformer's fit."""

    inputs: InputKind = "features"
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
    targets: TargetSource = "merged"
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
        for name, words in (("inputs", InputKind), ("targets", TargetSource)):
            if getattr(self, name) not in get_args(words):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(words))}, got {getattr(self, name)!r}")


MASK_TRANSFORMER_PRESETS = {
    "tiny": MaskTransformerTrainConfig(steps=4, batch=2, queries=8, layers=1, checkpoint_every=2),
    "plain": MaskTransformerTrainConfig(),
    "cpu": MaskTransformerTrainConfig(
        targets="instances", doubt=1.0, crop_rate=0.25, drops_unknown=True, pastes_alike=True, embeds=True,
        average_decay=0.999,
    ),
    "gpu": MaskTransformerTrainConfig(
        inputs="pixels", batch=64, steps=4000, precision="bf16", average_decay=0.999, crop_rate=1.0,
        targets="instances", drops_unknown=True, pastes_alike=True, embeds=True,
    ),
}  # fmt: skip
"""`tiny` shows that everything turns; `plain` learns what shows in the panoptic maps, each object alike; `cpu`, as the
bundled model, learns all masks by their scores, in about an hour on two cores; `gpu` does so on one large GPU."""
