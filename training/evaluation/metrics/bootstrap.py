"""How sure a figure is: bootstrap over pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
Counts = TypeVar("Counts")
MetricFunction = Callable[[Float[np.ndarray, "D N"]], dict[str, Float[np.ndarray, "D"]]]
"""How often each picture counts, a row a draw, to each figure in 0..1 for every draw."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceInterval:
    """A figure in percent with its 95 % bootstrap interval over pictures."""

    value: float
    low: float
    high: float


def bootstrap(
    count: int, measure: MetricFunction, *, draws: int = RESAMPLES, seed: int = 0
) -> dict[str, ConfidenceInterval]:
    """Each figure over all pictures, and between which values 95 % of resampled sets have it; in percent."""
    generator = np.random.default_rng(seed)
    drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(draws)]
    values, spread = measure(np.ones((1, count))), measure(np.array(drawn, np.float64))
    intervals = {}
    for key, value in values.items():
        low, high = np.percentile(spread[key], [2.5, 97.5])
        intervals[key] = ConfidenceInterval(value=to_percent(value[0]), low=to_percent(low), high=to_percent(high))
    return intervals


def to_percent(share: float) -> float:
    """In percent, as reports show it."""
    return round(100 * float(share), 2)


def stack_counts(counts: Sequence[Counts]) -> Counts:
    """A dataclass of arrays whose first axis runs over the given ones."""
    first = counts[0]
    names = [entry.name for entry in fields(first)]  # type: ignore[arg-type]  # every use is a dataclass
    return type(first)(**{name: np.stack([getattr(each, name) for each in counts]) for name in names})


def weighted_sums(counts: Counts, weights: Float[np.ndarray, "D N"]) -> Counts:
    """Sums over the first axis of each array, once for each row of weights."""
    names = [entry.name for entry in fields(counts)]  # type: ignore[arg-type]  # every use is a dataclass
    return type(counts)(**{name: weights @ getattr(counts, name) for name in names})
