"""Measures the stages of a request."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.telemetry.metrics import Stage, Telemetry
from service.telemetry.version_stats import VersionStats


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
