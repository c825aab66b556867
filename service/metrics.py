"""Prometheus metrics of the service, and what is recorded of one loaded version and of one request."""

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from model.contract import TASKS, Contract, Task
from model.contract import Histogram as OutputHistogram
from model.drift import BIN_EDGES, build_histograms, population_stability_index
from model.postprocessing.panoptic import Segmentation, Statistic, output_statistics

Stage = Literal["read", "decode", "queue", "infer", "merge", "encode"]
Outcome = Literal["ok", "client_error", "rejected", "timeout", "cancelled", "error"]
ModelState = Literal["loading", "ready", "failed", "restarting", "draining"]
VersionRole = Literal["loading", "active", "canary", "shadow", "standby", "failed", "unloaded", "missing_from_registry"]
ReleaseReason = Literal["max_batch_size", "max_queue_delay", "deadline", "shutdown"]
"""Why a batch was run: it is full, its first image has waited long enough, a deadline is close, or the server stops."""
RollbackCause = Literal["load_failed", "errors", "latency", "drift"]

_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
_STAGE_BUCKETS_S = tuple(0.0005 * 2**power for power in range(15))
_LAG_PERIOD_S = 0.05
_LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_RATIO_BUCKETS = tuple(tenth / 10 for tenth in range(11))
_SIZE_BUCKETS = tuple(4**power for power in range(5, 14))
_VERSION = ("model", "version")

RECENT_IMAGES = 200
"""Images whose latency and failures are kept."""
DRIFT_WINDOW = 500
"""Outputs that are compared with the reference."""
MIN_DRIFT_SAMPLES = 200
"""Outputs before the drift is published: with fewer, chance alone gives a large index."""


class Telemetry:
    """The metrics of one app, in a Prometheus registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._create_request_metrics()
        self._create_batch_metrics()
        self._create_output_metrics()
        self._create_model_metrics()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe_batch(
        self, input_size: tuple[int, int], image_sizes: Sequence[tuple[int, int]], reason: ReleaseReason
    ) -> None:
        """Record a batch that is about to run; sizes are (height, width)."""
        height, width = input_size
        self.batch_size.labels(f"{height}x{width}", reason).observe(len(image_sizes))
        covered = sum(size[0] * size[1] for size in image_sizes)
        self.batch_padding.observe(1.0 - covered / (height * width * len(image_sizes)))

    def set_state(self, state: ModelState) -> None:
        """Set the state of the process in `useg_model_state`."""
        for each in get_args(ModelState):
            self.model_state.labels(each).set(each == state)

    def init_series(self, contract: Contract) -> None:
        """Create the series of an artifact at 0: Prometheus sees no increase in a series that starts at 1."""
        version = (contract.name, contract.version)
        for task in TASKS:
            self.request_duration.labels(task)
            for outcome in get_args(Outcome):
                self.requests.labels(*version, task, outcome)
        for size in contract.input_sizes:
            for reason in get_args(ReleaseReason):
                self.batch_size.labels(f"{size.height_px}x{size.width_px}", reason)
        for stage in get_args(Stage):
            self.stage_duration.labels(stage)
        for histogram in self.output_histograms:
            histogram.labels(*version)

    def _create_request_metrics(self) -> None:
        self.http_request_duration = self._histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests.",
            _REQUEST_BUCKETS_S,
            "http_request_method",
            "http_route",
            "http_response_status_code",
        )
        self.requests = self._counter("useg_requests", "Segmentation requests.", *_VERSION, "task", "outcome")
        self.request_duration = self._histogram(
            "useg_request_duration_seconds", "Duration of successful requests.", _REQUEST_BUCKETS_S, "task"
        )
        self.requests_rejected = self._counter("useg_requests_rejected", "Rejected requests.", "reason")
        self.requests_cancelled = self._counter(
            "useg_requests_cancelled", "Requests whose client disconnected, by the stage they were in.", "stage"
        )
        self.stage_duration = self._histogram(
            "useg_stage_duration_seconds", "Time that an image spends in a stage.", _STAGE_BUCKETS_S, "stage"
        )
        self.event_loop_lag = self._histogram(
            "useg_event_loop_lag_seconds", "Delay with which the event loop wakes up.", _LAG_BUCKETS_S
        )

    def _create_batch_metrics(self) -> None:
        self.queue_depth = self._gauge("useg_queue_depth", "Images waiting for the network.")
        self.queue_capacity = self._gauge("useg_queue_capacity", "Maximum images waiting for the network.")
        self.requests_in_flight = self._gauge("useg_requests_in_flight", "Admitted requests without a response yet.")
        self.batch_size = self._histogram(
            "useg_batch_size", "Images per batch.", _BATCH_BUCKETS, "input_size", "release_reason"
        )
        self.batch_padding = self._histogram(
            "useg_batch_padding_ratio", "Fraction of a batch's pixels that are padding.", _RATIO_BUCKETS
        )
        self.batch_splits = self._counter("useg_batch_splits", "Batches that failed and were split in two.", "reason")
        self.inference_failures = self._counter("useg_inference_failures", "Images on which the network failed.")
        self.worker_restarts = self._counter("useg_worker_restarts", "Restarts of the inference worker.", "part")

    def _create_output_metrics(self) -> None:
        self.image_pixels = self._histogram("useg_image_pixels", "Pixels per image.", _SIZE_BUCKETS)
        self.response_bytes = self._histogram("useg_response_bytes", "Bytes per response.", _SIZE_BUCKETS)
        self.segments = self._histogram("useg_segments_per_image", "Segments per image.", _COUNT_BUCKETS, *_VERSION)
        self.void = self._histogram(
            "useg_void_ratio", "Fraction of an image's pixels without a segment.", _RATIO_BUCKETS, *_VERSION
        )
        self.mean_score = self._histogram(
            "useg_mean_score", "Mean score of an image's segments.", _RATIO_BUCKETS, *_VERSION
        )
        self.output_histograms = (self.segments, self.void, self.mean_score)
        """Those of one version, which end with it."""
        self.output_drift = self._gauge(
            "useg_output_drift_psi",
            "Population stability index of recent outputs against the artifact's reference.",
            "measure",
            *_VERSION,
        )
        self.output_drift_limit = self._gauge("useg_output_drift_psi_limit", "Index above which outputs have drifted.")

    def _create_model_metrics(self) -> None:
        self.model_info = self._gauge(
            "useg_model_info", "Served models.", "name", "version", "sha256", "backend", "precision"
        )
        self.skipped_backend_info = self._gauge(
            "useg_skipped_backend_info", "Faster backends that are not in use, and why.", *_VERSION, "backend", "reason"
        )
        self.model_load_duration = self._gauge("useg_model_load_seconds", "Time to load and warm up the last model.")
        self.model_state = self._gauge("useg_model_state", "State of the model (1 for the current one).", "state")
        self.model_version_state = self._gauge(
            "useg_model_version_state",
            "Role of each version (1 for the current one).",
            *_VERSION,
            "state",
        )
        self.rollbacks = self._counter("useg_rollbacks", "Versions rolled back or rejected.", "model", "cause")
        self.shadow_images = self._counter("useg_shadow_images", "Images sent to a shadow version.", "model", "outcome")
        self.category_name_edits = self._counter("useg_category_name_edits", "Edits of category names.", "model")
        self.set_state("loading")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def outcome_of_status(status: int) -> Outcome:
    """Return the outcome that a request with this response status counts as."""
    special: dict[int, Outcome] = {429: "rejected", 499: "cancelled", 503: "rejected", 504: "timeout"}
    return special.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "error")


async def record_event_loop_lag(telemetry: Telemetry) -> None:
    """Record the delay of the event loop until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        telemetry.event_loop_lag.observe(max(0.0, loop.time() - due))


@dataclass(frozen=True, kw_only=True)
class VersionMetrics:
    """Recent images of one version, as a rollout is judged by them."""

    images: int = 0
    failures: int = 0
    """Images on which it failed and another version did not."""
    p95_s: float = 0.0
    """95th percentile of the time from an image's bytes to its encoded segments."""
    outputs: Mapping[Statistic, OutputHistogram] = field(default_factory=dict)
    """Histograms of its outputs; empty without a reference."""
    reference: Mapping[Statistic, OutputHistogram] = field(default_factory=dict)
    """Histograms of the artifact's drift reference."""


class VersionStats:
    """Records recent images, outputs and totals of one version; thread-safe."""

    def __init__(self, contract: Contract, telemetry: Telemetry) -> None:
        self.labels = (contract.name, contract.version)
        """Labels of the version in metrics."""
        self.counts: defaultdict[str, int] = defaultdict(int)
        """Of the stages of its images, and of requests with a successful (`success`) or another (`fail`) response."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Total durations of the same."""
        self.last_inference_s = 0.0
        """Time of the last image, in seconds since 1970; 0 for never."""
        self._telemetry = telemetry
        self._reference = {
            name: contract.drift_reference[name] for name in BIN_EDGES if name in contract.drift_reference
        }
        self._recent: deque[float | None] = deque(maxlen=RECENT_IMAGES)
        self._outputs: deque[Mapping[Statistic, float]] = deque(maxlen=DRIFT_WINDOW)
        self._lock = threading.Lock()
        telemetry.init_series(contract)

    def record_duration(self, kind: Stage | Literal["success", "fail"], seconds: float) -> None:
        """Add the stage of an image, or a request, to the totals."""
        with self._lock:
            self.counts[kind] += 1
            self.seconds[kind] += seconds

    def record_image(self, seconds: float | None) -> None:
        """Record a segmented image; None for one (or a request) that another version answered instead."""
        with self._lock:
            self._recent.append(seconds)

    def record_outputs(self, segmentations: Mapping[Task, Segmentation], *, is_default: bool) -> None:
        """Record the outputs for one image; only panoptic ones with the artifact's thresholds count towards drift."""
        self.last_inference_s = time.time()
        task, segmentation = next(iter(segmentations.items()))
        statistics = output_statistics(segmentation)
        self._telemetry.segments.labels(*self.labels).observe(statistics["segments"])
        self._telemetry.void.labels(*self.labels).observe(statistics["void"])
        if scores := [segment.score for segment in segmentation.segments]:
            self._telemetry.mean_score.labels(*self.labels).observe(sum(scores) / len(scores))
        if self._reference and is_default and task == "panoptic":
            with self._lock:
                self._outputs.append(statistics)

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

    def close(self) -> None:
        """Remove the output series of this version from the metrics; Prometheus keeps their history."""
        for histogram in self._telemetry.output_histograms:
            histogram.remove(*self.labels)
        for name in self._reference:
            self._telemetry.output_drift.remove(name, *self.labels)

    def publish_drift(self) -> None:
        """Set the drift of recent outputs in the metrics, once there are enough of them."""
        with self._lock:
            if len(self._outputs) < MIN_DRIFT_SAMPLES:
                return
            histograms = build_histograms(self._outputs)
        for name, reference in self._reference.items():
            if sum(histograms[name].counts):
                psi = population_stability_index(reference, histograms[name])
                self._telemetry.output_drift.labels(name, *self.labels).set(psi)


StageSpan = tuple[Stage, int, int]
"""A stage, and the start and end of one pass through it in nanoseconds since 1970."""


class RequestRecord:
    """What the metrics, the trace and `Server-Timing` say of one segmentation; thread-safe."""

    def __init__(self, telemetry: Telemetry | None, task: str = "unknown", stats: VersionStats | None = None) -> None:
        """Without `telemetry`, stages are not recorded in the metrics; `stats` are those of the version at work."""
        self.task = task
        self.stats = stats
        self.stage: Stage = "read"
        """The stage that the request is in, for one that is cancelled there."""
        self.spans: list[StageSpan] = []
        """In the order of their ends."""
        self._telemetry = telemetry

    def enter(self, stage: Stage) -> None:
        self.stage = stage

    def add(self, stage: Stage, seconds: float, *, ended_ago_s: float = 0.0) -> None:
        """Record a stage that ended `ended_ago_s` before now; a request's images add up."""
        ended_ns = time.time_ns() - int(ended_ago_s * 1e9)
        self.spans.append((stage, ended_ns - int(seconds * 1e9), ended_ns))
        if self._telemetry:
            self._telemetry.stage_duration.labels(stage).observe(seconds)
        if self.stats:
            self.stats.record_duration(stage, seconds)

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Measure a block; if it raises, nothing is recorded."""
        self.stage = stage
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started)

    def render(self) -> str:
        """Return the value of a `Server-Timing` header, in milliseconds."""
        durations_ms: defaultdict[Stage, float] = defaultdict(float)
        for stage, started_ns, ended_ns in self.spans:
            durations_ms[stage] += (ended_ns - started_ns) / 1e6
        return ", ".join(f"{stage};dur={duration_ms:.1f}" for stage, duration_ms in durations_ms.items())
