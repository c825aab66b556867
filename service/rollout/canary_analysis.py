"""Decides from recent metrics whether a new version is worse than the one it replaces or runs next to."""

import logging
from dataclasses import dataclass

from model.contract import Contract, Histogram
from model.drift import STATISTICS, Statistic, population_stability_index
from model.errors import ContractMismatch, DeadlineExceeded, NotReady, QueueFull
from service.inference.pipeline import Pipeline
from service.telemetry.metrics import RollbackCause
from service.telemetry.recorders import VersionMetrics

logger = logging.getLogger(__name__)

_MIN_FAILURES = 3
"""A single broken image may be sent twice."""
_MIN_EXCESS_P95_S = 0.05
"""A smaller difference is not noticed, and not even measured on a busy machine."""
_MIN_EXCESS_RUN_S = 0.02
_MIN_RUNS, _MAX_RUNS = 3, 12
"""Timed runs before rollout; the shortest counts, because other load only makes runs longer."""


@dataclass(frozen=True, kw_only=True)
class AnalysisThresholds:
    """How much worse than the other version a version may be."""

    max_error_rate: float
    """Maximum fraction of images on which it fails and another version does not."""
    max_latency_ratio: float
    """Maximum ratio of the p95 latencies."""
    max_psi: float
    """Maximum difference of the drifts from each version's own reference, as computed by `excess_psi`."""
    min_samples: int = 50
    """Images of both before latency and outputs are compared."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Why a version is rolled back."""

    cause: RollbackCause
    reason: str


def check_identity(contract: Contract, model: str, version: str) -> None:
    """Raise ContractMismatch unless the artifact names the model and version of its folder."""
    if (contract.name, contract.version) != (model, version):
        raise ContractMismatch(
            f"the folder of version {version!r} of {model!r} holds version {contract.version!r} of {contract.name!r}"
        )


async def check_latency(candidate: Pipeline, active: Pipeline, max_ratio: float) -> None:
    """Raise ContractMismatch if an image takes the candidate more than `max_ratio` times as long, side by side."""
    candidate_s = active_s = float("inf")
    try:
        for run in range(1, _MAX_RUNS + 1):
            candidate_s = min(candidate_s, await candidate.time_run())
            active_s = min(active_s, await active.time_run())
            if run >= _MIN_RUNS and candidate_s <= max(max_ratio * active_s, active_s + _MIN_EXCESS_RUN_S):
                return
    except (QueueFull, NotReady, DeadlineExceeded) as error:
        logger.warning("latency of %s %s not measured: %s", candidate.contract.name, candidate.contract.version, error)
        return
    raise ContractMismatch(f"an image takes {candidate_s:.3f} s, with the active version {active_s:.3f} s")


def find_regression(new: VersionMetrics, old: VersionMetrics, thresholds: AnalysisThresholds) -> Regression | None:
    """Return what makes the new version worse than the old one; None if nothing does."""
    if new.failures >= _MIN_FAILURES and new.failures > thresholds.max_error_rate * new.images:
        reason = f"{new.failures} of {new.images} images failed that the other version segmented"
        return Regression(cause="errors", reason=reason)
    if min(new.images, old.images) >= thresholds.min_samples:
        is_noticeable = new.p95_s - old.p95_s > _MIN_EXCESS_P95_S
        if is_noticeable and new.p95_s > thresholds.max_latency_ratio * old.p95_s:
            reason = f"the p95 latency is {new.p95_s:.2f} s, that of the other version {old.p95_s:.2f} s"
            return Regression(cause="latency", reason=reason)
    for name in STATISTICS:
        # Unusual images make both versions drift: only the difference counts.
        psi = excess_psi(new, name, thresholds.min_samples)
        old_psi = excess_psi(old, name, thresholds.min_samples) or 0.0
        if psi is not None and psi - old_psi > thresholds.max_psi:
            reason = f"{name} drifted by {psi:.2f} from the reference, those of the other version by {old_psi:.2f}"
            return Regression(cause="drift", reason=reason)
    return None


def excess_psi(metrics: VersionMetrics, name: Statistic, min_samples: int) -> float | None:
    """Return the stability index of a statistic against the reference, minus its expectation by chance.

    For samples of one population the index is about chi-squared with one degree of freedom less than bins, divided by
    the harmonic sum of the sample sizes (Yurdakul 2018, theorem 1); the mean of that is subtracted. Half a count is
    added to each bin, so that empty ones do not dominate. None without a reference or with fewer than `min_samples`.
    """
    seen, reference = metrics.outputs.get(name), metrics.reference.get(name)
    if seen is None or reference is None or seen.edges != reference.edges:
        return None
    if sum(seen.counts) < min_samples or not sum(reference.counts):
        return None
    by_chance = (len(seen.counts) - 1) * (1 / sum(seen.counts) + 1 / sum(reference.counts))
    return max(0.0, population_stability_index(_smooth(reference), _smooth(seen)) - by_chance)


def _smooth(histogram: Histogram) -> Histogram:
    return Histogram(edges=histogram.edges, counts=tuple(2 * count + 1 for count in histogram.counts))
