"""What the service measures of itself, in Prometheus' terms."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

Stage = Literal["read", "decode", "queue", "infer", "merge", "encode"]
Outcome = Literal["ok", "bad_input", "rejected", "deadline", "cancelled", "error"]

_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
_STAGE_BUCKETS_S = tuple(0.0005 * 2**power for power in range(15))


class Telemetry:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.request_seconds = Histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests.",
            ["method", "route", "status"],
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self.requests = Counter(
            "seg_requests", "Requests for a segmentation.", ["task", "outcome"], registry=self.registry
        )
        self.rejected = Counter(
            "seg_rejected", "Requests turned away, by the slug of the problem.", ["reason"], registry=self.registry
        )
        self.stage_seconds = Histogram(
            "seg_stage_duration_seconds",
            "Time a picture spends in each stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self.queue_depth = Gauge("seg_queue_depth", "Pictures that wait for the network.", registry=self.registry)
        self.batch_size = Histogram(
            "seg_batch_size", "Pictures in a run.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.segments = Histogram(
            "seg_segments_per_image",
            "Segments in an answer.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.model = Info("seg_model", "The artifact that answers.", registry=self.registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Stopwatch:
    """The seconds that one request spends in each stage; every one is also counted in the telemetry."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._seconds: dict[Stage, float] = {}

    def add(self, stage: Stage, seconds: float) -> None:
        self._seconds[stage] = seconds
        self._telemetry.stage_seconds.labels(stage).observe(seconds)

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Measure the block; one that raises is not counted."""
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started)

    def render(self) -> str:
        """The value of a `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in self._seconds.items())


def name_outcome(status: int) -> Outcome:
    """What became of a request, by the status of its answer."""
    match status:
        case 503:
            return "rejected"
        case 504:
            return "deadline"
        case 499:
            return "cancelled"
        case _ if status < 400:
            return "ok"
        case _ if status < 500:
            return "bad_input"
        case _:
            return "error"
