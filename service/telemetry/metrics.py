"""What the service measures of itself, in Prometheus' terms."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from model.contract import TASKS, Contract

Stage = Literal["read", "decode", "queue", "preprocess", "infer", "merge", "encode", "serialize"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Outcome = Literal["ok", "bad_input", "rejected", "deadline", "cancelled", "error"]
ModelState = Literal["opening", "ready", "refused", "restarting", "draining"]
MODEL_STATES: tuple[ModelState, ...] = ("opening", "ready", "refused", "restarting", "draining")
VersionRole = Literal["opening", "active", "canary", "shadow", "standby", "refused", "idle", "orphaned"]
VERSION_ROLES: tuple[VersionRole, ...] = get_args(VersionRole)
ReleaseReason = Literal["full", "delay", "deadline", "drain"]
"""What released a batch: it was full, its first item had waited long enough, a deadline pressed, or the end is near."""
_ROLLBACK_CAUSES = ("refused", "errors", "latency", "drift")

_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
_STAGE_BUCKETS_S = tuple(0.0005 * 2**power for power in range(15))
_LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_TENTHS = tuple(tenth / 10 for tenth in range(11))
_POWERS_OF_4 = tuple(4**power for power in range(5, 14))


@dataclass(frozen=True, kw_only=True)
class ModelInfoLabels:
    """What answers."""

    name: str
    version: str
    sha256: str
    """Of the network's file."""
    backend: str
    precision: str


class SharedGauge:
    """What one of several versions adds to a gauge."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._value = 0

    def set(self, value: int) -> None:
        self._gauge.inc(value - self._value)
        self._value = value


class Telemetry:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._shown: dict[str, frozenset[str]] = {}
        ProcessCollector(registry=self.registry)
        self._count_requests()
        self._count_batches()
        self._describe_answers()
        self._describe_model()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe_batch(
        self, input_size: tuple[int, int], sizes: Sequence[tuple[int, int]], reason: ReleaseReason
    ) -> None:
        """Count a batch that is about to run; its canvas and its pictures as height, width."""
        height, width = input_size
        self.batch_size.labels(f"{height}x{width}", reason).observe(len(sizes))
        covered = sum(size[0] * size[1] for size in sizes)
        self.batch_padding.observe(1.0 - covered / (height * width * len(sizes)))

    def show_models(self, models: Iterable[ModelInfoLabels]) -> None:
        """Say what answers from now on."""
        self.model.clear()
        for each in models:
            self.model.labels(**asdict(each)).set(1)

    def show_versions(self, model: str, roles: Mapping[str, VersionRole]) -> None:
        """Say what the versions of a model of a registry are up to; of others that it had, nothing more."""
        for version in self._shown.get(model, frozenset()) - roles.keys():
            for each in VERSION_ROLES:
                self.model_version_state.remove(model, version, each)
        for version, role in roles.items():
            for each in VERSION_ROLES:
                self.model_version_state.labels(model, version, each).set(each == role)
        self._shown[model] = frozenset(roles)
        for cause in _ROLLBACK_CAUSES:
            self.rollbacks.labels(model, cause)  # from 0, as in `expect`

    def expect(self, contract: Contract) -> None:
        """Begin what will be counted of an artifact at 0: of a series that begins at 1, Prometheus sees no rise."""
        for task in TASKS:
            self.answer_seconds.labels(task)
            for outcome in get_args(Outcome):
                self.requests.labels(contract.name, contract.version, task, outcome)
        for canvas in contract.input_sizes:
            for reason in get_args(ReleaseReason):
                self.batch_size.labels(f"{canvas.height_px}x{canvas.width_px}", reason)
        for histogram in (self.segments, self.void, self.mean_score):
            histogram.labels(contract.name, contract.version)
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    def forget(self, contract: Contract) -> None:
        """Tell nothing more of how an artifact's answers look: versions come and go, and Prometheus keeps what was."""
        for histogram in (self.segments, self.void, self.mean_score):
            histogram.remove(contract.name, contract.version)

    def show_state(self, state: ModelState) -> None:
        """Say what the artifact is up to."""
        for each in MODEL_STATES:
            self.model_state.labels(each).set(each == state)

    def _count_requests(self) -> None:
        self.request_seconds = self._make_histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests.",
            _REQUEST_BUCKETS_S,
            "method",
            "route",
            "status",
        )
        self.requests = self._make_counter(
            "seg_requests", "Requests for a segmentation.", "model", "version", "task", "outcome"
        )
        self.answer_seconds = self._make_histogram(
            "seg_answer_duration_seconds",
            "Time from a request to its answer, those alone that got one.",
            _REQUEST_BUCKETS_S,
            "task",
        )
        self.rejected = self._make_counter("seg_rejected", "Requests turned away, by the reason.", "reason")
        self.cancelled = self._make_counter("seg_cancelled", "Requests whose sender hung up, by the stage.", "stage")
        self.stage_seconds = self._make_histogram(
            "seg_stage_duration_seconds", "Time a picture spends in each stage.", _STAGE_BUCKETS_S, "stage"
        )
        self.loop_lag = self._make_histogram(
            "seg_event_loop_lag_seconds", "How late the event loop wakes up.", _LAG_BUCKETS_S
        )

    def _count_batches(self) -> None:
        self.queue_depth = self._make_gauge("seg_queue_depth", "Pictures that wait for the network.")
        self.queue_capacity = self._make_gauge("seg_queue_capacity", "Most pictures that may wait for the network.")
        self.requests_in_flight = self._make_gauge(
            "seg_inflight", "Requests that were admitted and are not answered yet."
        )
        self.batch_size = self._make_histogram(
            "seg_batch_size", "Pictures in a batch.", (1, 2, 4, 8, 16, 32), "bucket", "release_reason"
        )
        self.batch_padding = self._make_histogram(
            "seg_batch_padding_ratio", "Share of a batch's pixels that show no picture.", _TENTHS
        )
        self.batch_splits = self._make_counter("seg_batch_retries", "Batches that failed and were halved.", "reason")
        self.inference_failures = self._make_counter("seg_poison_items", "Pictures on which the network failed alone.")
        self.worker_restarts = self._make_counter("seg_worker_restarts", "Deaths of what runs the network.", "part")

    def _describe_answers(self) -> None:
        self.image_pixels = self._make_histogram("seg_image_pixels", "Pixels of a picture.", _POWERS_OF_4)
        self.response_bytes = self._make_histogram("seg_response_bytes", "Bytes of an answer.", _POWERS_OF_4)
        which = ("model", "version")
        self.segments = self._make_histogram("seg_segments_per_image", "Segments in an answer.", _COUNTS, *which)
        self.void = self._make_histogram("seg_void_fraction", "Share of a picture in no segment.", _TENTHS, *which)
        self.mean_score = self._make_histogram("seg_mean_score", "Mean score of the segments.", _TENTHS, *which)
        self.output_drift = self._make_gauge(
            "seg_output_drift",
            "Population stability index of the last answers against the artifact's reference.",
            "measure",
            *which,
        )
        self.canary_max_psi = self._make_gauge(
            "seg_output_drift_limit", "The drift above which answers are other ones."
        )

    def _describe_model(self) -> None:
        self.model = self._make_gauge(
            "seg_model_info", "1 for each artifact that answers.", "name", "version", "sha256", "backend", "precision"
        )
        self.category_name_edits = self._make_counter("seg_name_edits", "Edits of clusters' names made here.", "model")
        self.model_load_seconds = self._make_gauge("seg_model_load_seconds", "Time until the artifact was ready.")
        self.model_state = self._make_gauge("seg_model_state", "1 for what the artifact is up to.", "state")
        self.model_version_state = self._make_gauge(
            "seg_version_state", "1 for what each version of a registry is up to.", "model", "version", "state"
        )
        self.rollbacks = self._make_counter(
            "seg_rollbacks", "Versions that the service took back or refused.", "model", "cause"
        )
        self.shadow_images = self._make_counter(
            "seg_shadow_pictures", "Pictures that a shadow was to answer, too.", "model", "outcome"
        )
        self.show_state("opening")

    def _make_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _make_gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _make_histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def outcome_of_status(status: int) -> Outcome:
    """What became of a request, by the status of its answer."""
    match status:
        case 429 | 503:
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
