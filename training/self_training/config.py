"""Options of self-training; free of torch, for the command line."""

from dataclasses import dataclass

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """Options of a round of self-training."""

    min_relative_score: float = 0.5
    """Minimum score of an instance in the panoptic map in the first round, as a fraction of the highest score of its
    cluster, 0..1."""
    score_increment: float = 0.05
    """Increase of the minimum score in each later round, 0..1."""
    multi_crop: bool = False
    """Run the encoder on crops of each photo, too, which finds small instances: about 3 instead of 0.4 core-seconds
    per photo."""
    force: bool = False
    """Write labels even if the predictions are less consistent than those of the previous round."""

    def __post_init__(self) -> None:
        for name in ("min_relative_score", "score_increment"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
