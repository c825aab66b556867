"""How answers look in the mean, so that a service can tell when they begin to look otherwise."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from math import log
from typing import Literal, get_args

import numpy as np

from model.contract import Histogram
from model.errors import ConfigError
from model.postprocessing.panoptic import VOID, Segmentation

Statistic = Literal["segments", "void", "score"]
"""Of a panoptic answer: its number of segments, the share of void pixels, the mean score of its things."""
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

BIN_EDGES: Mapping[Statistic, tuple[float, ...]] = {
    "segments": (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 25),
    "void": (0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8),
    "score": (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9),
}
"""A value on an edge counts above it."""
_MIN_FRACTION = 1e-3
"""Taken for the share of an empty bin, whose logarithm there is none of."""


def output_statistics(answer: Segmentation) -> dict[Statistic, float]:
    """The measures of a panoptic answer; one without things has no score."""
    scores = [segment.score for segment in answer.segments if segment.is_thing]
    measured: dict[Statistic, float] = {
        "segments": float(len(answer.segments)),
        "void": np.count_nonzero(answer.label_map == VOID) / answer.label_map.size,
    }
    return measured | ({"score": sum(scores) / len(scores)} if scores else {})


def build_histograms(measured: Iterable[Mapping[Statistic, float]]) -> dict[Statistic, Histogram]:
    """A histogram of each measure over many answers."""
    counts = {name: [0] * (len(BIN_EDGES[name]) + 1) for name in STATISTICS}
    for each in measured:
        for name, value in each.items():
            counts[name][bisect_right(BIN_EDGES[name], value)] += 1
    return {name: Histogram(edges=BIN_EDGES[name], counts=tuple(counts[name])) for name in STATISTICS}


def population_stability_index(reference: Histogram, seen: Histogram) -> float:
    """The population stability index: 0 for equal shares; above 0.25 is commonly taken for another population.

    Raises ConfigError if the edges differ or one of them is empty.
    """
    if reference.edges != seen.edges or not sum(reference.counts) or not sum(seen.counts):
        raise ConfigError("two histograms are compared that have the same edges and are not empty")
    index = 0.0
    for expected, actual in zip(reference.counts, seen.counts, strict=True):
        before = max(expected / sum(reference.counts), _MIN_FRACTION)
        after = max(actual / sum(seen.counts), _MIN_FRACTION)
        index += (after - before) * log(after / before)
    return index
