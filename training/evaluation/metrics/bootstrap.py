"""Confidence intervals of metrics by bootstrap over images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
MetricFunction = Callable[[Float[np.ndarray, "D N"]], dict[str, Float[np.ndarray, "D"]]]
"""Takes how often each image counts, one row per resample; returns each metric (0..1) for every resample."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceInterval:
    """A metric in percent with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


def bootstrap(
    count: int, metrics: MetricFunction, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, ConfidenceInterval]:
    """Return each metric over all `count` images with its 95 % percentile interval, in percent."""
    generator = np.random.default_rng(seed)
    drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples)]
    values, samples = metrics(np.ones((1, count))), metrics(np.array(drawn, np.float64))
    intervals = {}
    for name, value in values.items():
        low, high = np.percentile(samples[name], [2.5, 97.5])
        intervals[name] = ConfidenceInterval(value=to_percent(value[0]), low=to_percent(low), high=to_percent(high))
    return intervals


def to_percent(value: float) -> float:
    """Return a fraction in percent with two decimals."""
    return round(100.0 * float(value), 2)
