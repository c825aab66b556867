"""Regressions found in metrics that are made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from model.contract import Histogram
from model.drift import BIN_EDGES
from service.metrics import VersionMetrics
from service.rollout.canary_analysis import excess_psi, find_regression
from service.settings import Settings

SETTINGS = Settings(canary_max_error_rate=0.05, canary_max_latency_ratio=3.0, canary_max_psi=0.35)
BINS = len(BIN_EDGES["void"]) + 1


def make_histogram(*counts: int) -> Histogram:
    return Histogram(edges=BIN_EDGES["void"], counts=(*counts, *[0] * (BINS - len(counts))))


def make_metrics(
    images: int = 100, failures: int = 0, p95_s: float = 0.2, outputs: Histogram | None = None
) -> VersionMetrics:
    reference = make_histogram(500, 500)
    return VersionMetrics(
        images=images,
        failures=failures,
        p95_s=p95_s,
        outputs={"void": outputs or make_histogram(50, 50)},
        reference={"void": reference},
    )


GOOD = make_metrics()


def test_an_equal_version_has_no_regression() -> None:
    assert find_regression(GOOD, GOOD, SETTINGS) is None
    assert find_regression(VersionMetrics(), VersionMetrics(), SETTINGS) is None


@pytest.mark.parametrize(
    ("images", "failures", "is_bad"), [(3, 3, True), (2, 2, False), (100, 5, False), (100, 6, True), (200, 10, False)]
)
def test_three_failures_above_the_maximum_rate_are_a_regression(images: int, failures: int, is_bad: bool) -> None:
    regression = find_regression(make_metrics(images=images, failures=failures), GOOD, SETTINGS)
    assert (regression[0] if regression else None) == ("errors" if is_bad else None)


@pytest.mark.parametrize(
    ("new_s", "old_s", "is_bad"), [(0.61, 0.2, True), (0.59, 0.2, False), (0.05, 0.01, False), (0.07, 0.01, True)]
)
def test_a_p95_above_the_maximum_ratio_is_a_regression(new_s: float, old_s: float, is_bad: bool) -> None:
    new, old = make_metrics(p95_s=new_s), make_metrics(p95_s=old_s)
    regression = find_regression(new, old, SETTINGS)
    assert (regression[0] if regression else None) == ("latency" if is_bad else None)
    assert find_regression(replace(new, images=49), old, SETTINGS) is None  # too few to tell
    assert find_regression(new, replace(old, images=49), SETTINGS) is None


def test_drifted_outputs_are_a_regression() -> None:
    strange = make_metrics(outputs=make_histogram(0, 0, 60))
    regression = find_regression(strange, GOOD, SETTINGS)
    assert regression is not None
    assert (regression[0], "void drifted" in regression[1]) == ("drift", True)
    assert find_regression(make_metrics(outputs=make_histogram(0, 0, 49)), GOOD, SETTINGS) is None  # too few to tell
    assert find_regression(strange, strange, SETTINGS) is None  # the images are what changed
    assert find_regression(replace(strange, reference={}), GOOD, SETTINGS) is None


def test_samples_of_the_reference_itself_stay_below_the_threshold() -> None:
    """Fifty draws from the reference itself, a thousand times; shifted by a bin, they are told from it."""
    rng = np.random.default_rng(0)
    shares = np.array([1, 25, 47, 63, 26, 22, 12, 3, 1, 0, 0])  # the bundled artifact's own
    reference = Histogram(edges=BIN_EDGES["void"], counts=tuple(int(each) for each in shares))
    indices = []
    for _ in range(1000):
        drawn = tuple(int(each) for each in rng.multinomial(50, shares / shares.sum()))
        record = VersionMetrics(
            outputs={"void": Histogram(edges=BIN_EDGES["void"], counts=drawn)}, reference={"void": reference}
        )
        indices.append(excess_psi(record, "void"))
    assert max(index for index in indices if index is not None) < 0.8 * SETTINGS.canary_max_psi
    shifted = Histogram(edges=BIN_EDGES["void"], counts=(0, *reference.counts[:-1]))
    index = excess_psi(VersionMetrics(outputs={"void": shifted}, reference={"void": reference}), "void")
    assert index is not None
    assert index > SETTINGS.canary_max_psi
