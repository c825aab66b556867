"""What one version did since it was opened: it goes when the version does, and costs the metrics no label."""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model.contract import Contract, Histogram
from model.drift import STATISTICS, Statistic, build_histograms, output_statistics, population_stability_index
from model.postprocessing.panoptic import Segmentation
from service.telemetry.metrics import STAGES, Outcome, Stage, Telemetry


@dataclass(frozen=True, kw_only=True)
class DurationSum:
    """How often something took place, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> "DurationSum":
        return DurationSum(count=self.count + 1, seconds=self.seconds + seconds)


class VersionStats:
    """The sums of one version of a model. Safe to share by threads."""

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self.last_answer_s = 0.0
        """When a picture was last answered, in seconds since 1970; 0 for never."""
        self.stages = dict.fromkeys(STAGES, DurationSum())
        """Pictures in each stage."""
        self.answered = DurationSum()
        """Requests that got what they asked for, from the first byte to the end."""
        self.failed = DurationSum()
        """Requests that ended in any other way."""
        self._lock = threading.Lock()

    def take_stage(self, stage: Stage, seconds: float) -> None:
        """Take what a picture needed for a stage."""
        with self._lock:
            self.stages[stage] = self.stages[stage].add(seconds)

    def take_request(self, outcome: Outcome, seconds: float) -> None:
        """Take a request that came to this version."""
        with self._lock:
            if outcome == "ok":
                self.answered = self.answered.add(seconds)
            else:
                self.failed = self.failed.add(seconds)


RECENT_WINDOW = 200
"""Last pictures that are looked at."""


class RecentOutcomes:
    """To be used on the event loop alone."""

    def __init__(self) -> None:
        self._last: deque[float | None] = deque(maxlen=RECENT_WINDOW)

    @property
    def tried(self) -> int:
        """Pictures that are looked at."""
        return len(self._last)

    @property
    def failures(self) -> int:
        """Those among them that another version had to answer."""
        return sum(seconds is None for seconds in self._last)

    @property
    def p95_s(self) -> float:
        """What 95 of 100 answers took at most, in seconds, from the picture to its segments; 0 if there are none."""
        taken = [seconds for seconds in self._last if seconds is not None]
        return float(np.percentile(taken, 95)) if taken else 0.0

    def take(self, seconds: float) -> None:
        self._last.append(seconds)

    def fail(self) -> None:
        self._last.append(None)

    def clear(self) -> None:
        """Begin anew, in another role."""
        self._last.clear()


DRIFT_WINDOW = 500
"""Last answers that are compared."""
MIN_DRIFT_SAMPLES = 200
"""Answers before a comparison is told: of fewer, chance alone makes an index that looks like drift."""
_DRIFT_INTERVAL = 10
"""Answers between two comparisons."""


class DriftMonitor:
    """Tells the telemetry how far the last answers of one version are from its reference; safe to share by threads."""

    def __init__(self, contract: Contract, telemetry: Telemetry) -> None:
        self._which = (contract.name, contract.version)
        self._references = {
            name: contract.drift_reference[name] for name in STATISTICS if name in contract.drift_reference
        }
        self._gauge = telemetry.output_drift
        self._last: deque[Mapping[Statistic, float]] = deque(maxlen=DRIFT_WINDOW)
        self._seen = 0
        self._lock = threading.Lock()

    def observe(self, answer: Segmentation) -> None:
        """Take a panoptic answer that was made with the contract's thresholds, as the reference was."""
        if not self._references:
            return
        measured = output_statistics(answer)
        with self._lock:
            self._last.append(measured)
            self._seen += 1
            if self._seen < MIN_DRIFT_SAMPLES or self._seen % _DRIFT_INTERVAL:
                return
            histograms = build_histograms(self._last)
        for name, reference in self._references.items():
            if sum(histograms[name].counts):
                self._gauge.labels(name, *self._which).set(population_stability_index(reference, histograms[name]))

    def build_histograms(self) -> Mapping[Statistic, Histogram]:
        """How the last answers look; nothing of a version without a reference."""
        with self._lock:
            return build_histograms(self._last)

    def begin(self) -> None:
        """Forget the answers so far, as the version gets another role."""
        with self._lock:
            self._last.clear()
            self._seen = 0

    def forget(self) -> None:
        """Tell nothing of this version any more."""
        for name in self._references:
            self._gauge.remove(name, *self._which)
