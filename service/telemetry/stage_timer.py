"""Where a request spends its time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.telemetry.metrics import Stage, Telemetry
from service.telemetry.version_stats import VersionStats


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """One stay in a stage, in nanoseconds since 1970."""

    stage: Stage
    started_ns: int
    ended_ns: int


class StageTimer:
    """The seconds that one request spends in each stage; every one is also counted in the telemetry, and in `tally`."""

    def __init__(self, telemetry: Telemetry, tally: VersionStats | None = None) -> None:
        self._telemetry = telemetry
        self._tally = tally
        self.laps: list[StageSpan] = []
        """In the order of their ends."""
        self._seconds: dict[Stage, float] = {}
        self.stage: Stage = "read"
        """Where the request is, or was when it ended."""

    def enter(self, stage: Stage) -> None:
        self.stage = stage

    def add(self, stage: Stage, seconds: float, *, ago_s: float = 0.0) -> None:
        """Take the time that a stage needed; it ended `ago_s` before now."""
        ended_ns = time.time_ns() - int(ago_s * 1e9)
        self.laps.append(StageSpan(stage=stage, started_ns=ended_ns - int(seconds * 1e9), ended_ns=ended_ns))
        self._seconds[stage] = seconds
        self._telemetry.stage_duration.labels(stage).observe(seconds)
        if self._tally:
            self._tally.take_stage(stage, seconds)

    @contextmanager
    def follow(self, tally: VersionStats) -> Iterator["StageTimer"]:
        """One for a picture of the request that a version answers; what it measures is this one's, too, in the end."""
        own = StageTimer(self._telemetry, tally)
        own.stage = self.stage
        try:
            yield own
        finally:
            self.stage = own.stage
            self.laps += own.laps
            for stage, seconds in own._seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Measure the block; one that raises is not counted."""
        self.stage = stage
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started)

    def render(self) -> str:
        """The value of a `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in self._seconds.items())
