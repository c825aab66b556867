"""Whether a new version does as well as the one before it: figures in, a verdict out, no clock and no state."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model.contract import Contract, Histogram
from model.drift import STATISTICS, Statistic, population_stability_index
from model.errors import ContractMismatch, DeadlineExceeded, NotReady, QueueFull
from service.inference.pipeline import Pipeline

RollbackCause = Literal["errors", "latency", "drift"]

_MIN_FAILURES = 3
"""One picture may be at fault itself, and be sent twice."""
_MIN_EXCESS_P95_S = 0.05
"""What is slower by less is not felt, and on a busy machine not even measured."""


@dataclass(frozen=True, kw_only=True)
class AnalysisThresholds:
    """How much worse a version may be."""

    errors: float
    """Largest share of pictures on which it fails where another version does not."""
    slowest: float
    """Most times as long as the other's p95."""
    drift: float
    """How much further its answers may be from its reference than the other's from that one's; see `excess_psi`."""
    least: int = 50
    """Answers from which on time and looks are compared."""


@dataclass(frozen=True, kw_only=True)
class VersionMetrics:
    """What is known of a version's last pictures."""

    tried: int = 0
    failures: int = 0
    p95_s: float = 0.0
    seen: Mapping[Statistic, Histogram] = field(default_factory=dict)
    reference: Mapping[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnalysisResult:
    """Why a version is taken back."""

    cause: RollbackCause
    reason: str


def collect_metrics(pipeline: Pipeline) -> VersionMetrics:
    """What is known of a version now."""
    track = pipeline.track
    return VersionMetrics(
        tried=track.tried,
        failures=track.failures,
        p95_s=track.p95_s,
        seen=pipeline.drift.build_histograms(),
        reference=pipeline.contract.drift_reference,
    )


def analyze(new: VersionMetrics, old: VersionMetrics, limits: AnalysisThresholds) -> AnalysisResult | None:
    """What speaks against the new version, if anything does."""
    if new.failures >= _MIN_FAILURES and new.failures > limits.errors * new.tried:
        reason = f"{new.failures} of {new.tried} pictures failed that the other version answered"
        return AnalysisResult(cause="errors", reason=reason)
    if min(new.tried, old.tried) >= limits.least:
        is_felt = new.p95_s - old.p95_s > _MIN_EXCESS_P95_S
        if is_felt and new.p95_s > limits.slowest * old.p95_s:
            reason = f"95 of 100 answers took up to {new.p95_s:.2f} s, the other version's {old.p95_s:.2f} s"
            return AnalysisResult(cause="latency", reason=reason)
    return _judge_looks(new, old, limits)


def excess_psi(record: VersionMetrics, name: Statistic, least: int) -> float | None:
    """The stability index of a measure against the reference, less what chance alone gives in samples of this size.

    None if fewer than `least` answers were seen, or there is no reference. For samples of one population the index is
    about chi-squared with a degree less than there are bins, divided by the harmonic sum of their sizes (Yurdakul 2018,
    theorem 1); its mean is what is taken off. Half a count more in every bin keeps empty ones from weighing most.
    """
    seen, reference = record.seen.get(name), record.reference.get(name)
    if seen is None or reference is None or seen.edges != reference.edges:
        return None
    if sum(seen.counts) < least or not sum(reference.counts):
        return None
    chance = (len(seen.counts) - 1) * (1 / sum(seen.counts) + 1 / sum(reference.counts))
    return max(0.0, population_stability_index(_smooth(reference), _smooth(seen)) - chance)


def _smooth(histogram: Histogram) -> Histogram:
    return Histogram(edges=histogram.edges, counts=tuple(2 * count + 1 for count in histogram.counts))


def _judge_looks(new: VersionMetrics, old: VersionMetrics, limits: AnalysisThresholds) -> AnalysisResult | None:
    """Pictures of another kind make every version drift: only what the old one does not share counts."""
    for name in STATISTICS:
        drift = excess_psi(new, name, limits.least)
        shared = excess_psi(old, name, limits.least) or 0.0
        if drift is not None and drift - shared > limits.drift:
            reason = f"{name} drifted by {drift:.2f} from the reference, the other version's by {shared:.2f}"
            return AnalysisResult(cause="drift", reason=reason)
    return None


logger = logging.getLogger(__name__)

_MIN_RUNS, _MAX_RUNS = 3, 12
"""The shortest counts: whatever else the machine does only makes runs longer. More of them if it looks slow."""
_MIN_EXCESS_RUN_S = 0.02
"""What is slower by less is not felt."""


def require_name(contract: Contract, model: str, version: str) -> None:
    """Raise ContractMismatch unless an artifact is what its folder says."""
    if (contract.name, contract.version) != (model, version):
        raise ContractMismatch(
            f"version {version!r} of {model!r} says that it is {contract.version!r} of {contract.name!r}"
        )


async def require_speed(candidate: Pipeline, active: Pipeline, slowest: float) -> None:
    """Raise ContractMismatch if the candidate takes more than `slowest` times as long for a picture, side by side."""
    own_s = other_s = float("inf")
    try:
        for run in range(1, _MAX_RUNS + 1):
            own_s = min(own_s, await candidate.time_run())
            other_s = min(other_s, await active.time_run())
            if run >= _MIN_RUNS and own_s <= max(slowest * other_s, other_s + _MIN_EXCESS_RUN_S):
                return
    except (QueueFull, NotReady, DeadlineExceeded) as error:
        logger.warning("%s %s was not timed: %s", candidate.contract.name, candidate.contract.version, error)
        return
    raise ContractMismatch(f"a picture takes {own_s:.3f} s, the active version {other_s:.3f} s")
