"""How STEGO is trained; free of heavy imports, for the command line."""

from dataclasses import dataclass, replace

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Term:
    """One of the three correlation losses."""

    weight: float
    shift: float
    """Feature similarity above which codes are pulled together, and below which they are pushed apart."""


@dataclass(frozen=True, kw_only=True)
class StegoConfig:
    """The recipe; lambda and b of the paper are the terms' weights and shifts."""

    itself: Term
    """A picture with itself."""
    neighbour: Term
    """With one of its nearest neighbours."""
    stranger: Term
    """With other pictures of the batch."""
    dimensions: int = 70
    """Of the code."""
    dropout: float = 0.1
    """Share of the channels."""
    samples: int = 11
    """Points along each side of the random grid in a picture."""
    neighbours: int = 7
    """Nearest pictures among which a positive is drawn."""
    shuffles: int = 5
    """Permutations of the batch that make strangers."""
    steps: int = 5000
    batch: int = 16
    learning_rate: float = 5e-4
    probe_learning_rate: float = 5e-3
    is_centred: bool = True
    """Feature similarities lose their mean over the second picture: small objects are not drowned by large ones."""
    is_clamped: bool = True
    """Codes are pushed apart until they are orthogonal and no further."""
    is_capped: bool = False
    """Codes more alike than 0.8 gain nothing."""
    checkpoint_every: int = 500
    """Steps."""

    def __post_init__(self) -> None:
        for name in ("dimensions", "samples", "neighbours", "shuffles", "steps", "batch", "learning_rate",
                     "probe_learning_rate", "checkpoint_every"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of STEGO must be positive, got {getattr(self, name)}")
        if self.batch < 2:
            raise ConfigError("a batch of one picture has no strangers: STEGO needs two or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in 0..1, got {self.dropout}")


_SMALL = StegoConfig(
    itself=Term(weight=0.67, shift=0.08),
    neighbour=Term(weight=0.25, shift=0.02),
    stranger=Term(weight=0.63, shift=0.66),
)
STEGO_PRESETS = {
    "small": _SMALL,
    "small-10-3": replace(_SMALL, stranger=Term(weight=0.63, shift=0.16)),
    "base": replace(
        _SMALL,
        itself=Term(weight=0.1, shift=0.12),
        neighbour=Term(weight=1.0, shift=0.2),
        stranger=Term(weight=0.1538476246415498, shift=1.0),
    ),
    "cityscapes": replace(
        _SMALL,
        itself=Term(weight=1.0, shift=0.45828472207),
        neighbour=Term(weight=0.577453483136995, shift=0.1754346515479633),
        stranger=Term(weight=0.9058762625226623, shift=0.31361241889448443),
    ),
    "shipped": replace(
        _SMALL,
        itself=Term(weight=0.67, shift=0.18),
        neighbour=Term(weight=0.25, shift=0.12),
        stranger=Term(weight=0.63, shift=0.46),
    ),
    "tiny": replace(_SMALL, dimensions=8, steps=4, batch=2, checkpoint_every=2),
}
"""The published sets of hyper-parameters (mhamilton723/STEGO: checkpoints cocostuff27_vit_small_1_31_22 and _10_3,
cocostuff27_vit_base_5, cityscapes_vit_base_1, and the values in the shipped configuration); `tiny` shows that
everything turns, within seconds."""
