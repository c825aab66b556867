"""Statistics of one loaded version, and the stages of one request: totals, recent images, drift of outputs, spans."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from model.contract import Contract, Histogram, Task
from model.drift import STATISTICS, Statistic, build_histograms, output_statistics, population_stability_index
from model.postprocessing.panoptic import Segmentation
from service.telemetry.metrics import STAGES, Outcome, Stage, Telemetry

RECENT_IMAGES = 200
"""Images whose latency and failures are kept."""
DRIFT_WINDOW = 500
"""Outputs that are compared with the reference."""
MIN_DRIFT_SAMPLES = 200
"""Outputs before the drift is published: with fewer, chance alone gives a large index."""
_DRIFT_INTERVAL = 10
"""Outputs between two updates of the published drift."""


@dataclass(frozen=True, kw_only=True)
class DurationSum:
    """Number of events and their total duration."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> "DurationSum":
        return DurationSum(count=self.count + 1, seconds=self.seconds + seconds)


@dataclass(frozen=True, kw_only=True)
class VersionMetrics:
    """Recent images of one version, as a rollout is judged by them."""

    images: int = 0
    failures: int = 0
    """Images on which it failed and another version did not."""
    p95_s: float = 0.0
    """95th percentile of the time from an image's bytes to its encoded segments."""
    outputs: Mapping[Statistic, Histogram] = field(default_factory=dict)
    """Histograms of its outputs; empty without a reference."""
    reference: Mapping[Statistic, Histogram] = field(default_factory=dict)
    """Histograms of the artifact's drift reference."""


class VersionStats:
    """Records everything that is counted of one version; thread-safe. Ends with the version, unlike the metrics."""

    def __init__(self, contract: Contract, telemetry: Telemetry) -> None:
        self.model, self.version = contract.name, contract.version
        self.last_inference_s = 0.0
        """Time of the last image, in seconds since 1970; 0 for never."""
        self.stages = dict.fromkeys(STAGES, DurationSum())
        self.succeeded = DurationSum()
        """Requests with a successful response."""
        self.failed = DurationSum()
        """All other requests."""
        self._contract = contract
        self._telemetry = telemetry
        self._reference = {
            name: contract.drift_reference[name] for name in STATISTICS if name in contract.drift_reference
        }
        self._recent: deque[float | None] = deque(maxlen=RECENT_IMAGES)
        self._outputs: deque[Mapping[Statistic, float]] = deque(maxlen=DRIFT_WINDOW)
        self._outputs_seen = 0
        self._lock = threading.Lock()
        telemetry.init_series(contract)

    def record_stage(self, stage: Stage, seconds: float) -> None:
        """Record the time that one image spent in a stage."""
        with self._lock:
            self.stages[stage] = self.stages[stage].add(seconds)

    def record_request(self, outcome: Outcome, seconds: float) -> None:
        """Record a request that was routed to this version."""
        with self._lock:
            if outcome == "ok":
                self.succeeded = self.succeeded.add(seconds)
            else:
                self.failed = self.failed.add(seconds)

    def record_image(self, seconds: float) -> None:
        """Record a segmented image."""
        with self._lock:
            self._recent.append(seconds)

    def record_failure(self) -> None:
        """Record an image or request that another version answered instead."""
        with self._lock:
            self._recent.append(None)

    def record_outputs(self, segmentations: Mapping[Task, Segmentation], *, is_default: bool) -> None:
        """Record the outputs for one image; only panoptic ones with the artifact's thresholds count towards drift."""
        first = next(iter(segmentations.values()))
        version = (self.model, self.version)
        self.last_inference_s = time.time()
        self._telemetry.segments.labels(*version).observe(len(first.segments))
        void = 1.0 - np.count_nonzero(first.label_map) / first.label_map.size
        self._telemetry.void.labels(*version).observe(void)
        if first.segments:
            mean = sum(segment.score for segment in first.segments) / len(first.segments)
            self._telemetry.mean_score.labels(*version).observe(mean)
        if self._reference and is_default and "panoptic" in segmentations:
            self._record_drift(output_statistics(segmentations["panoptic"]))

    def recent(self) -> VersionMetrics:
        """Return the figures of recent images."""
        with self._lock:
            recent, outputs = list(self._recent), build_histograms(self._outputs)
        latencies = [seconds for seconds in recent if seconds is not None]
        return VersionMetrics(
            images=len(recent),
            failures=recent.count(None),
            p95_s=float(np.percentile(latencies, 95)) if latencies else 0.0,
            outputs=outputs,
            reference=self._reference,
        )

    def reset_recent(self) -> None:
        """Forget recent images, as the version gets another role."""
        with self._lock:
            self._recent.clear()
            self._outputs.clear()
            self._outputs_seen = 0

    def close(self) -> None:
        """Remove the series of this version from the metrics."""
        self._telemetry.remove_series(self._contract)
        for name in self._reference:
            self._telemetry.output_drift.remove(name, self.model, self.version)

    def _record_drift(self, statistics: Mapping[Statistic, float]) -> None:
        with self._lock:
            self._outputs.append(statistics)
            self._outputs_seen += 1
            if self._outputs_seen < MIN_DRIFT_SAMPLES or self._outputs_seen % _DRIFT_INTERVAL:
                return
            histograms = build_histograms(self._outputs)
        for name, reference in self._reference.items():
            if sum(histograms[name].counts):
                psi = population_stability_index(reference, histograms[name])
                self._telemetry.output_drift.labels(name, self.model, self.version).set(psi)


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """One pass through a stage, in nanoseconds since 1970."""

    stage: Stage
    started_ns: int
    ended_ns: int


class StageTimer:
    """Times of one request by stage, summed over its images; thread-safe.

    Each is also recorded in `telemetry`, unless that is None, and in the statistics of the version at work.
    """

    def __init__(self, telemetry: Telemetry | None) -> None:
        self._telemetry = telemetry
        self._seconds: dict[Stage, float] = {}
        self._lock = threading.Lock()
        self.stage: Stage = "read"
        """The stage that was entered last."""
        self.spans: list[StageSpan] = []
        """In the order of their ends."""

    def enter(self, stage: Stage) -> None:
        """Set the stage that the request is in, for one that is cancelled there."""
        self.stage = stage

    def add(self, stage: Stage, seconds: float, stats: VersionStats | None = None, *, ended_ago_s: float = 0.0) -> None:
        """Record a stage that ended `ended_ago_s` before now."""
        ended_ns = time.time_ns() - int(ended_ago_s * 1e9)
        span = StageSpan(stage=stage, started_ns=ended_ns - int(seconds * 1e9), ended_ns=ended_ns)
        with self._lock:
            self.spans.append(span)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if self._telemetry:
            self._telemetry.stage_duration.labels(stage).observe(seconds)
        if stats:
            stats.record_stage(stage, seconds)

    @contextmanager
    def time(self, stage: Stage, stats: VersionStats | None = None) -> Iterator[None]:
        """Measure a block; if it raises, nothing is recorded."""
        self.stage = stage
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started, stats)

    def render(self) -> str:
        """Return the value of a `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in self._seconds.items())
