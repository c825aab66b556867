"""Metrics belong to one app, stages are timed once, and log lines for machines are JSON."""

import logging
import sys
from dataclasses import replace

import numpy as np
import orjson
import pytest
from fake_service import CONTRACT

from model.contract import Contract, Histogram
from model.drift import BIN_EDGES
from model.postprocessing.panoptic import Segment, Segmentation, Statistic
from service.cli import JsonFormatter
from service.metrics import (
    MIN_DRIFT_SAMPLES,
    Telemetry,
    VersionStats,
    outcome_of_status,
)

VERSION = {"model": "fake", "version": "1+test"}
SEGMENTATION = Segmentation(
    label_map=np.ones((1, 1), np.int32), segments=(Segment(id=1, cluster=1, is_thing=True, score=0.95),)
)


def test_the_series_of_an_artifact_start_at_zero() -> None:
    read = Telemetry()
    read.init_series(CONTRACT)
    requests = VERSION | {"task": "semantic", "outcome": "ok"}
    assert read.registry.get_sample_value("useg_requests_total", requests) == 0.0
    batches = {"input_size": "56x56", "release_reason": "max_queue_delay"}
    assert read.registry.get_sample_value("useg_batch_size_count", batches) == 0.0
    assert read.registry.get_sample_value("useg_stage_duration_seconds_count", {"stage": "encode"}) == 0.0


def test_the_outcome_follows_from_the_status() -> None:
    outcomes = [outcome_of_status(status) for status in (200, 408, 422, 429, 499, 500, 503, 504)]
    assert outcomes == ["ok", "client_error", "client_error", "rejected", "cancelled", "error", "rejected", "timeout"]


def make_reference(statistic: Statistic, index: int) -> Histogram:
    """100 outputs in one bin."""
    edges = BIN_EDGES[statistic]
    return Histogram(edges=edges, counts=tuple(100 * (bin_ == index) for bin_ in range(len(edges) + 1)))


@pytest.fixture
def described() -> Contract:
    """A contract whose reference has the segments and void of `SEGMENTATION`, but lower scores."""
    reference = {"segments": 1, "void": 0, "score": 0}
    histograms = {name: make_reference(name, index) for name, index in reference.items()}  # type: ignore[arg-type]
    return replace(CONTRACT, drift_reference=histograms)


def record(contract: Contract, count: int) -> tuple[Telemetry, VersionStats]:
    telemetry = Telemetry()
    stats = VersionStats(contract, telemetry)
    for _ in range(count):
        stats.record_outputs({"panoptic": SEGMENTATION}, is_default=True)
    stats.publish_drift()
    return telemetry, stats


def read_drift(telemetry: Telemetry, statistic: str) -> float | None:
    return telemetry.registry.get_sample_value("useg_output_drift_psi", VERSION | {"measure": statistic})


def test_outputs_like_the_reference_do_not_drift_and_others_do(described: Contract) -> None:
    telemetry, _ = record(described, MIN_DRIFT_SAMPLES)
    assert read_drift(telemetry, "segments") == 0.0
    assert read_drift(telemetry, "void") == 0.0
    # All scores moved from one bin to another; an empty bin counts as 0.001: twice 0.999 ln 1000.
    assert round(read_drift(telemetry, "score") or 0.0, 2) == 13.80


def test_drift_is_published_from_enough_outputs_on_until_the_version_is_unloaded(described: Contract) -> None:
    telemetry, stats = record(described, MIN_DRIFT_SAMPLES - 1)
    assert read_drift(telemetry, "segments") is None
    stats.record_outputs({"panoptic": SEGMENTATION}, is_default=True)
    stats.publish_drift()
    assert read_drift(telemetry, "segments") == 0.0
    assert telemetry.registry.get_sample_value("useg_segments_per_image_count", VERSION) == MIN_DRIFT_SAMPLES
    stats.close()
    assert read_drift(telemetry, "segments") is None
    assert telemetry.registry.get_sample_value("useg_segments_per_image_count", VERSION) is None


@pytest.mark.parametrize(("task", "is_default"), [("instance", True), ("semantic", True), ("panoptic", False)])
def test_only_panoptic_outputs_with_default_thresholds_count_towards_drift(
    described: Contract, task: str, is_default: bool
) -> None:
    stats = VersionStats(described, Telemetry())
    stats.record_outputs({task: SEGMENTATION}, is_default=is_default)  # type: ignore[dict-item]
    assert sum(stats.recent().outputs["segments"].counts) == 0


def test_a_json_log_line_holds_the_message_the_fields_and_the_traceback() -> None:
    record = logging.LogRecord("service.app", logging.INFO, "", 0, "%s done\nwell", ("all",), None)
    record.fields = {"status": 200, "request_id": "a"}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert orjson.loads(line) | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "service.app",
        "message": "all done\nwell",
        "status": 200,
        "request_id": "a",
    }
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert "ValueError: why" in orjson.loads(JsonFormatter().format(record))["exception"]
