"""Trials of a new version: shadow runs, and whether it is worse than the version that it replaces or runs next to."""

import asyncio
import logging
import random
from collections.abc import Iterable

from model.contract import Histogram
from model.drift import BIN_EDGES, population_stability_index
from model.errors import ContractMismatch, DeadlineExceeded, InputError, NotReady, QueueFull
from model.postprocessing.panoptic import Statistic
from service.inference.pipeline import ImageContent, Pipeline
from service.metrics import RequestRecord, RollbackCause, Telemetry, VersionMetrics
from service.requests import LOWEST_PRIORITY, RequestContext, SegmentOptions
from service.settings import Settings

logger = logging.getLogger(__name__)

_MIN_FAILURES = 3
"""A single broken image may be sent twice."""
_MIN_SAMPLES = 50
"""Images of both versions before latency and outputs are compared."""
_MIN_EXCESS_P95_S = 0.05
"""A smaller difference is not noticed, and not even measured on a busy machine."""
_MIN_EXCESS_RUN_S = 0.02
_MIN_RUNS, _MAX_RUNS = 3, 12
"""Timed runs before rollout; the shortest counts, because other load only makes runs longer."""
_MAX_SHADOW_IMAGES = 4
_SHADOW_IDLE_WAIT_S = 10.0
_SHADOW_POLL_S = 0.02
_SHADOW_TIMEOUT_S = 60.0


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


def find_regression(
    new: VersionMetrics, old: VersionMetrics, settings: Settings, *, is_loading: bool = False
) -> tuple[RollbackCause, str] | None:
    """Return the cause and the reason why the new version is worse than the old one; None if it is not.

    While another version `is_loading`, which takes processor time from serving, latency is not compared: it would slow
    the new version more than its past.
    """
    if new.failures >= _MIN_FAILURES and new.failures > settings.canary_max_error_rate * new.images:
        reason = f"{new.failures} of {new.images} images failed that the other version segmented"
        return "errors", reason
    if min(new.images, old.images) >= _MIN_SAMPLES and not is_loading:
        is_noticeable = new.p95_s - old.p95_s > _MIN_EXCESS_P95_S
        if is_noticeable and new.p95_s > settings.canary_max_latency_ratio * old.p95_s:
            reason = f"the p95 latency is {new.p95_s:.2f} s, that of the other version {old.p95_s:.2f} s"
            return "latency", reason
    for name in BIN_EDGES:
        # Unusual images make both versions drift: only the difference counts.
        psi, old_psi = excess_psi(new, name), excess_psi(old, name) or 0.0
        if psi is not None and psi - old_psi > settings.canary_max_psi:
            reason = f"{name} drifted by {psi:.2f} from the reference, those of the other version by {old_psi:.2f}"
            return "drift", reason
    return None


def excess_psi(metrics: VersionMetrics, name: Statistic) -> float | None:
    """Return the stability index of a statistic against the reference, minus its expectation by chance.

    For samples of one population the index is about chi-squared with one degree of freedom less than bins, divided by
    the harmonic sum of the sample sizes (Yurdakul 2018, theorem 1); the mean of that is subtracted. Half a count is
    added to each bin, so that empty ones do not dominate. None without a reference or with too few samples.
    """
    seen, reference = metrics.outputs.get(name), metrics.reference.get(name)
    if seen is None or reference is None or seen.edges != reference.edges:
        return None
    if sum(seen.counts) < _MIN_SAMPLES or not sum(reference.counts):
        return None
    by_chance = (len(seen.counts) - 1) * (1 / sum(seen.counts) + 1 / sum(reference.counts))
    return max(0.0, population_stability_index(_smooth(reference), _smooth(seen)) - by_chance)


def _smooth(histogram: Histogram) -> Histogram:
    return Histogram(edges=histogram.edges, counts=tuple(2 * count + 1 for count in histogram.counts))


class ShadowRunner:
    """Re-runs a fraction of the images on another version while the active one is idle, and discards the results."""

    def __init__(self, pipeline: Pipeline, active: Pipeline, traffic_fraction: float, telemetry: Telemetry) -> None:
        self.pipeline = pipeline
        self.active = active
        self.traffic_fraction = traffic_fraction
        self._counter = telemetry.shadow_images
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each image that waits or runs."""
        self._turn = asyncio.Lock()

    def submit(self, images: Iterable[ImageContent]) -> None:
        """Queue a sample of the images; without room in the queue they are dropped."""
        for image in images:
            if random.random() >= self.traffic_fraction:
                continue
            if len(self._tasks) > _MAX_SHADOW_IMAGES:
                self._count("dropped")
            else:
                task = asyncio.create_task(self._run(image))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Drop the images that wait."""
        for task in self._tasks:
            task.cancel()

    async def _run(self, image: ImageContent) -> None:
        async with self._turn:
            self._count(await self._segment(image) if await self._wait_until_active_is_idle() else "dropped")

    async def _segment(self, image: ImageContent) -> str:
        """Segment an image; return its outcome."""
        deadline = asyncio.get_running_loop().time() + _SHADOW_TIMEOUT_S
        context = RequestContext(deadline=deadline, priority=LOWEST_PRIORITY)
        record, contract = RequestRecord(None), self.pipeline.contract
        try:
            await self.pipeline.run(image, SegmentOptions(), lambda _result: None, context, record, contract)
        except InputError:
            return "ok"  # the same error as the active version's
        except Exception as error:  # of any kind: clients must not notice it
            logger.info("the shadow version failed: %r", error)
            self.pipeline.stats.record_image(None)
            return "failed"
        return "ok"

    async def _wait_until_active_is_idle(self) -> bool:
        for _ in range(round(_SHADOW_IDLE_WAIT_S / _SHADOW_POLL_S)):
            if self.active.scheduler.is_idle:
                return True
            await asyncio.sleep(_SHADOW_POLL_S)
        return False

    def _count(self, outcome: str) -> None:
        self._counter.labels(self.pipeline.contract.name, outcome).inc()
