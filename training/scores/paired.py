"""Two sources and the same pictures: is one better, or was it the pictures?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from training.scores.answers import Source
from training.scores.comparison import list_spaces
from training.scores.evaluate import compare_all
from training.scores.figures import count_panoptic_all, count_semantic_all, open_scorer
from training.scores.intervals import Interval, Measure, bootstrap, to_percent, weigh
from training.scores.naming import MatchPlan, name_clusters
from training.scores.scores import score_panoptic, score_semantic
from training.scores.truth import Truth

Weights = Float[np.ndarray, "D N"]
Figures = dict[str, Float[np.ndarray, "D"]]


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

    def differ(weights: Weights) -> Figures:
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
        panoptic = count_panoptic_all(comparisons, fit, spaces)
        things, stuff = slice(0, spaces.things), slice(spaces.things, None)
        measures.append(
            lambda weights: {
                name: score_panoptic(weigh(panoptic, weights), chosen)["pq"]
                for name, chosen in (("PQ", slice(None)), ("PQ things", things), ("PQ stuff", stuff))
            }
        )
    if truth.kind in ("panoptic", "semantic"):
        semantic = count_semantic_all(comparisons, fit, spaces)

        def measure_regions(weights: Weights) -> Figures:
            figures = score_semantic(weigh(semantic, weights))
            return {"mIoU": figures["miou"], "accuracy": figures["accuracy"]}

        measures.append(measure_regions)
    if truth.kind != "semantic":
        scorer = open_scorer(comparisons, fit, truth, "bbox" if truth.kind == "boxes" else "segm", is_named=False)
        measures.append(lambda weights: {name.upper(): each for name, each in scorer.measure(weights).items()})
    return lambda weights: {name: each for measured in measures for name, each in measured(weights).items()}
