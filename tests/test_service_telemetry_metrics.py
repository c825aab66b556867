"""Metrics belong to one app, and outcomes follow from statuses."""

from typing import get_args

import pytest
from fake_service import CONTRACT

from service.telemetry.metrics import RollbackCause, Telemetry, outcome_of_status
from service.telemetry.stage_timer import StageTimer


def test_two_apps_count_apart() -> None:
    first, second = Telemetry(), Telemetry()
    labels = {"model": "a", "version": "1", "task": "panoptic", "outcome": "ok"}
    first.requests.labels(**labels).inc()
    assert first.registry.get_sample_value("useg_requests_total", labels) == 1.0
    assert second.registry.get_sample_value("useg_requests_total", labels) is None


def test_what_will_be_counted_of_an_artifact_begins_at_zero() -> None:
    telemetry = Telemetry()
    telemetry.init_series(CONTRACT)
    labels = {"model": "fake", "version": "1+test", "task": "semantic", "outcome": "ok"}
    assert telemetry.registry.get_sample_value("useg_requests_total", labels) == 0.0
    batches = {"input_size": "56x56", "release_reason": "max_queue_delay"}
    assert telemetry.registry.get_sample_value("useg_batch_size_count", batches) == 0.0
    assert telemetry.registry.get_sample_value("useg_stage_duration_seconds_count", {"stage": "encode"}) == 0.0


def test_rollbacks_of_a_model_are_counted_from_zero_by_every_cause() -> None:
    telemetry = Telemetry()
    telemetry.set_version_roles("a", {"1": "active"})
    for cause in get_args(RollbackCause):
        assert telemetry.registry.get_sample_value("useg_rollbacks_total", {"model": "a", "cause": cause}) == 0.0


def test_a_stopwatch_tells_the_caller_milliseconds_and_the_histogram_seconds() -> None:
    telemetry = Telemetry()
    stopwatch = StageTimer(telemetry)
    stopwatch.add("decode", 0.25)
    stopwatch.add("infer", 1.0)
    assert stopwatch.render() == "decode;dur=250.0, infer;dur=1000.0"
    assert telemetry.registry.get_sample_value("useg_stage_duration_seconds_sum", {"stage": "decode"}) == 0.25


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "ok"),
        (413, "client_error"),
        (422, "client_error"),
        (429, "rejected"),
        (499, "cancelled"),
        (500, "error"),
        (503, "rejected"),
        (504, "timeout"),
    ],
)
def test_outcomes_follow_from_statuses(status: int, outcome: str) -> None:
    assert outcome_of_status(status) == outcome
