"""Whether a new version does as well as the one before it: figures in, a verdict out, no clock and no state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model.drift import MEASURES, Measure, compare
from model.histogram import Histogram
from service.artifact.pipeline import Pipeline

Cause = Literal["errors", "latency", "drift"]

_LEAST_FAILURES = 3
"""One picture may be at fault itself, and be sent twice."""
_LEAST_EXCESS_S = 0.05
"""What is slower by less is not felt, and on a busy machine not even measured."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much worse a version may be."""

    errors: float
    """Largest share of pictures on which it fails where another version does not."""
    slowest: float
    """Most times as long as the other's p95."""
    drift: float
    """How much further its answers may be from its reference than the other's from that one's; see `estimate_drift`."""
    least: int = 50
    """Answers from which on time and looks are compared."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a version's last pictures."""

    tried: int = 0
    failures: int = 0
    p95_s: float = 0.0
    seen: Mapping[Measure, Histogram] = field(default_factory=dict)
    reference: Mapping[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a version is taken back."""

    cause: Cause
    reason: str


def read_record(pipeline: Pipeline) -> Record:
    """What is known of a version now."""
    track = pipeline.track
    return Record(
        tried=track.tried,
        failures=track.failures,
        p95_s=track.p95_s,
        seen=pipeline.drift.count(),
        reference=pipeline.contract.reference,
    )


def judge(new: Record, old: Record, limits: Limits) -> Verdict | None:
    """What speaks against the new version, if anything does."""
    if new.failures >= _LEAST_FAILURES and new.failures > limits.errors * new.tried:
        reason = f"{new.failures} of {new.tried} pictures failed that the other version answered"
        return Verdict(cause="errors", reason=reason)
    if min(new.tried, old.tried) >= limits.least:
        is_felt = new.p95_s - old.p95_s > _LEAST_EXCESS_S
        if is_felt and new.p95_s > limits.slowest * old.p95_s:
            reason = f"95 of 100 answers took up to {new.p95_s:.2f} s, the other version's {old.p95_s:.2f} s"
            return Verdict(cause="latency", reason=reason)
    return _judge_looks(new, old, limits)


def estimate_drift(record: Record, name: Measure, least: int) -> float | None:
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
    return max(0.0, compare(_smooth(reference), _smooth(seen)) - chance)


def _smooth(histogram: Histogram) -> Histogram:
    return Histogram(edges=histogram.edges, counts=tuple(2 * count + 1 for count in histogram.counts))


def _judge_looks(new: Record, old: Record, limits: Limits) -> Verdict | None:
    """Pictures of another kind make every version drift: only what the old one does not share counts."""
    for name in MEASURES:
        drift = estimate_drift(new, name, limits.least)
        shared = estimate_drift(old, name, limits.least) or 0.0
        if drift is not None and drift - shared > limits.drift:
            reason = f"{name} drifted by {drift:.2f} from the reference, the other version's by {shared:.2f}"
            return Verdict(cause="drift", reason=reason)
    return None
