"""Verdicts on counts that are made by hand."""

import numpy as np
import pytest

from model.contract import Histogram
from model.drift import BIN_EDGES
from service.rollout.canary_analysis import AnalysisThresholds, VersionMetrics, analyze, excess_psi

LIMITS = AnalysisThresholds(errors=0.05, slowest=3.0, drift=0.35, least=50)
BINS = len(BIN_EDGES["void"]) + 1


def make_histogram(*counts: int) -> Histogram:
    return Histogram(edges=BIN_EDGES["void"], counts=(*counts, *[0] * (BINS - len(counts))))


def make_record(
    tried: int = 100, failures: int = 0, p95_s: float = 0.2, seen: Histogram | None = None
) -> VersionMetrics:
    reference = make_histogram(500, 500)
    return VersionMetrics(
        tried=tried,
        failures=failures,
        p95_s=p95_s,
        seen={"void": seen or make_histogram(50, 50)},
        reference={"void": reference},
    )


GOOD = make_record()


def test_a_version_that_does_as_the_other_is_kept() -> None:
    assert analyze(GOOD, GOOD, LIMITS) is None
    assert analyze(VersionMetrics(), VersionMetrics(), LIMITS) is None


@pytest.mark.parametrize(
    ("tried", "failures", "is_bad"), [(3, 3, True), (2, 2, False), (100, 5, False), (100, 6, True), (200, 10, False)]
)
def test_it_is_taken_back_for_failures_beyond_the_share_three_at_least(tried: int, failures: int, is_bad: bool) -> None:
    verdict = analyze(make_record(tried=tried, failures=failures), GOOD, LIMITS)
    assert (verdict.cause if verdict else None) == ("errors" if is_bad else None)


@pytest.mark.parametrize(
    ("new_s", "old_s", "is_bad"), [(0.61, 0.2, True), (0.59, 0.2, False), (0.05, 0.01, False), (0.07, 0.01, True)]
)
def test_it_is_taken_back_for_a_p95_that_is_longer_by_factor_and_felt(new_s: float, old_s: float, is_bad: bool) -> None:
    verdict = analyze(make_record(p95_s=new_s), make_record(p95_s=old_s), LIMITS)
    assert (verdict.cause if verdict else None) == ("latency" if is_bad else None)


def test_time_is_not_compared_before_there_are_enough_answers_of_both() -> None:
    assert analyze(make_record(tried=49, p95_s=9.0), GOOD, LIMITS) is None
    assert analyze(make_record(p95_s=9.0), make_record(tried=49), LIMITS) is None


def test_it_is_taken_back_when_its_answers_look_otherwise() -> None:
    verdict = analyze(make_record(seen=make_histogram(0, 0, 60)), GOOD, LIMITS)
    assert verdict is not None
    assert (verdict.cause, "void drifted" in verdict.reason) == ("drift", True)
    assert analyze(make_record(seen=make_histogram(0, 0, 49)), GOOD, LIMITS) is None  # too few to tell


def test_pictures_that_make_every_version_drift_are_no_fault_of_the_new_one() -> None:
    strange = make_record(seen=make_histogram(0, 0, 60))
    assert analyze(strange, strange, LIMITS) is None


def test_without_a_reference_nothing_drifts() -> None:
    record = VersionMetrics(tried=100, p95_s=0.2, seen={"void": make_histogram(0, 0, 60)})
    assert analyze(record, GOOD, LIMITS) is None


def test_chance_alone_hardly_looks_like_drift() -> None:
    """Fifty draws from the reference itself, a thousand times; shifted by a bin, they are told from it."""
    rng = np.random.default_rng(0)
    shares = np.array([1, 25, 47, 63, 26, 22, 12, 3, 1, 0, 0])  # the bundled artifact's own
    reference = Histogram(edges=BIN_EDGES["void"], counts=tuple(int(each) for each in shares))
    indices = []
    for _ in range(1000):
        drawn = tuple(int(each) for each in rng.multinomial(50, shares / shares.sum()))
        record = VersionMetrics(
            seen={"void": Histogram(edges=BIN_EDGES["void"], counts=drawn)}, reference={"void": reference}
        )
        indices.append(excess_psi(record, "void", 50))
    assert max(index for index in indices if index is not None) < 0.8 * LIMITS.drift
    shifted = Histogram(edges=BIN_EDGES["void"], counts=(0, *reference.counts[:-1]))
    index = excess_psi(VersionMetrics(seen={"void": shifted}, reference={"void": reference}), "void", 50)
    assert index is not None
    assert index > LIMITS.drift
