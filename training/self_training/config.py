"""Options of self-training; free of torch, for the command line."""

from dataclasses import dataclass

from training.option_types import Fraction


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
