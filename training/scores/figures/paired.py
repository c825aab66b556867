"""Two sources and the same pictures: is one better, or was it the pictures?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from training.scores.figures.figures import (
    Weights,
    count_panoptic_all,
    count_semantic_all,
    open_panoptic,
    open_scorer,
    open_semantic,
)
from training.scores.figures.intervals import Interval, Measure, bootstrap, to_percent
from training.scores.meetings.answers import Source
from training.scores.meetings.comparison import compare_all, list_spaces
from training.scores.meetings.instances import HEADLINES, Shape
from training.scores.naming.naming import MatchPlan, name_clusters
from training.scores.sets.truth import Truth

TITLES = {
    "pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff", "miou": "mIoU", "accuracy": "accuracy",
    **{name: name.upper() for name in HEADLINES},
}  # fmt: skip
"""The figures that are compared, and what they are called."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of both, in percent, and what the first has more, with its 95 % interval."""

    new: float
    old: float
    more: Interval


def compare_sources(
    new: tuple[Source, MatchPlan], old: tuple[Source, MatchPlan], truth: Truth
) -> dict[str, Difference]:
    """Every headline figure; each resampled set holds the same pictures for both."""
    later, earlier = (open_figures(source, truth, plan) for source, plan in (new, old))
    whole = np.ones((1, len(truth.pictures)))
    after, before = later(whole), earlier(whole)
    return {
        name: Difference(new=to_percent(after[name][0]), old=to_percent(before[name][0]), more=found)
        for name, found in bootstrap(len(truth.pictures), subtract(later, earlier)).items()
    }


def subtract(later: Measure, earlier: Measure) -> Measure:
    """How much more the first is, figure by figure."""

    def differ(weights: Weights) -> dict[str, Float[np.ndarray, "D"]]:
        after, before = later(weights), earlier(weights)
        return {name: after[name] - before[name] for name in after}

    return differ


def open_figures(source: Source, truth: Truth, plan: MatchPlan) -> Measure:
    """The headline figures of a source where pictures count so often; one pass over the photos."""
    comparisons = compare_all(source, truth)
    spaces = list_spaces(source, truth)
    fit = name_clusters(comparisons, truth, spaces, plan)
    measures: list[Measure] = []
    if truth.kind == "panoptic":
        measures.append(open_panoptic(count_panoptic_all(comparisons, fit, spaces), spaces.things))
    if truth.kind in ("panoptic", "semantic"):
        measures.append(open_semantic(count_semantic_all(comparisons, fit, spaces), None))
    if truth.kind != "semantic":
        shape: Shape = "bbox" if truth.kind == "boxes" else "segm"
        measures.append(open_scorer(comparisons, fit, truth, shape, is_named=False).measure)
    return lambda weights: {
        TITLES[name]: each for measure in measures for name, each in measure(weights).items() if name in TITLES
    }
