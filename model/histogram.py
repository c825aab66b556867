"""How often a number fell where."""

from dataclasses import dataclass

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between rising edges, below the first and above the last; a number on an edge counts above it."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ConfigError(f"a histogram of {len(self.edges)} rising edges has one bin more, not {len(self.counts)}")
        if min(self.counts) < 0:
            raise ConfigError(f"a histogram counts from 0 up, got {min(self.counts)}")
