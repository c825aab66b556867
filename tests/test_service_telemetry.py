"""Metrics belong to one app, and outcomes follow from statuses."""

import pytest

from service.telemetry import Stopwatch, Telemetry, name_outcome


def test_two_apps_count_apart() -> None:
    first, second = Telemetry(), Telemetry()
    labels = {"model": "a", "version": "1", "task": "panoptic", "outcome": "ok"}
    first.requests.labels(**labels).inc()
    assert first.registry.get_sample_value("seg_requests_total", labels) == 1.0
    assert second.registry.get_sample_value("seg_requests_total", labels) is None


def test_a_stopwatch_tells_the_caller_milliseconds_and_the_histogram_seconds() -> None:
    telemetry = Telemetry()
    stopwatch = Stopwatch(telemetry)
    stopwatch.add("decode", 0.25)
    stopwatch.add("infer", 1.0)
    assert stopwatch.render() == "decode;dur=250.0, infer;dur=1000.0"
    assert telemetry.registry.get_sample_value("seg_stage_duration_seconds_sum", {"stage": "decode"}) == 0.25


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "ok"),
        (413, "bad_input"),
        (422, "bad_input"),
        (429, "rejected"),
        (499, "cancelled"),
        (500, "error"),
        (503, "rejected"),
        (504, "deadline"),
    ],
)
def test_outcomes_follow_from_statuses(status: int, outcome: str) -> None:
    assert name_outcome(status) == outcome
