"""How masks are found; free of heavy imports, for the command line."""

from dataclasses import dataclass

from model.errors import ConfigError
from training.choices import PROPOSALS, REFINEMENTS, TOKENS, Proposals, Refinement, Tokens

MOST_OBJECTS = 12
"""Masks of a vote that one photo's panoptic map may hold."""


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """What masks depend on, beside the photos and the encoder."""

    proposals: Proposals = "vote"
    """What several views of the features agree on, or MaskCut; the next five concern MaskCut alone."""
    tokens: Tokens = "patches"
    """What is cut: the encoder's output, or, as published, the keys of its last attention on the stretched photo."""
    cuts: int = 3
    """Most masks a photo."""
    threshold: float = 0.3
    """Cosine above which two patches are near; 0.15 as published, on DINO's keys."""
    centred: bool = False
    """Take out each photo's mean token first; without it, all keys of DINOv2 are near to each other."""
    faithful: bool = False
    """Filter masks as the public code does, see CutPlan in training/labels/masks/discover.py."""
    objects: int = 7
    """Masks of a vote that make the panoptic map, in the mean over the photos: the likeliest things of all, at most 12
    of one photo."""
    refinement: Refinement = "guided"
    """How masks find the borders in the picture."""

    def __post_init__(self) -> None:
        for name in ("cuts", "objects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.objects > MOST_OBJECTS:
            raise ConfigError(f"objects must be at most {MOST_OBJECTS}, got {self.objects}")
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold must lie between 0 and 1, got {self.threshold}")
        for name, words in (("proposals", PROPOSALS), ("tokens", TOKENS), ("refinement", REFINEMENTS)):
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.proposals == "vote" and (self.tokens != "patches" or self.centred or self.faithful):
            raise ConfigError("keys, centring and the public code's filters go with MaskCut, not with a vote")
