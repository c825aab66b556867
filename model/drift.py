"""Histograms of the statistics of panoptic outputs, and the population stability index between two of them."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

import numpy as np

from model.contract import Histogram
from model.errors import ConfigError
from model.postprocessing.panoptic import Statistic

BIN_EDGES: Mapping[Statistic, tuple[float, ...]] = {
    "segments": (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 25),
    "void": (0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8),
    "score": (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9),
}
"""A value on an edge is in the bin above it."""
_MIN_FRACTION = 1e-3
"""Used for empty bins, as the index takes logarithms."""


def build_histograms(statistics: Iterable[Mapping[Statistic, float]]) -> dict[Statistic, Histogram]:
    """Return a histogram of each statistic over many images."""
    counts = {name: [0] * (len(BIN_EDGES[name]) + 1) for name in BIN_EDGES}
    for image in statistics:
        for name, value in image.items():
            counts[name][bisect_right(BIN_EDGES[name], value)] += 1
    return {name: Histogram(edges=BIN_EDGES[name], counts=tuple(counts[name])) for name in BIN_EDGES}


def population_stability_index(reference: Histogram, observed: Histogram) -> float:
    """Return the population stability index: 0 for equal distributions; above 0.25 commonly counts as drift.

    Raises ConfigError if the edges differ or a histogram is empty.
    """
    if reference.edges != observed.edges or not sum(reference.counts) or not sum(observed.counts):
        raise ConfigError("the two histograms must have the same edges and must not be empty")
    before, after = (
        np.maximum(np.array(each.counts) / sum(each.counts), _MIN_FRACTION) for each in (reference, observed)
    )
    return float(((after - before) * np.log(after / before)).sum())
