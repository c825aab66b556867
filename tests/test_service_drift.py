"""Drift is told once there are enough answers, and of plain panoptic ones alone."""

from dataclasses import replace

import numpy as np
import pytest
from fake_service import CONTRACT, RedSession, draw_halves, open_client, save

from model.backends.session import Session
from model.contract import Contract, Histogram
from model.drift import BIN_EDGES, Statistic
from model.postprocessing.panoptic import Segment, Segmentation
from service.telemetry.metrics import Telemetry
from service.telemetry.version_stats import MIN_DRIFT_SAMPLES, DriftMonitor

SURE = Segment(id=1, cluster=1, is_thing=True, score=0.95)


def make_reference(measure: Statistic, bin_: int) -> Histogram:
    """100 answers in one bin."""
    edges = BIN_EDGES[measure]
    return Histogram(edges=edges, counts=tuple(100 * (place == bin_) for place in range(len(edges) + 1)))


REFERENCE = {
    "segments": make_reference("segments", 1),
    "void": make_reference("void", 0),
    "score": make_reference("score", 0),
}
"""As the answers below are, but for scores: those had been below 0.3."""
DESCRIBED = replace(CONTRACT, drift_reference=REFERENCE)


def watch(answers: int) -> Telemetry:
    telemetry = Telemetry()
    drift = DriftMonitor(DESCRIBED, telemetry)
    for _ in range(answers):
        drift.observe(Segmentation(label_map=np.ones((1, 1), np.int32), segments=(SURE,)))
    return telemetry


def read(telemetry: Telemetry, measure: str) -> float | None:
    labels = {"measure": measure, "model": CONTRACT.name, "version": CONTRACT.version}
    return telemetry.registry.get_sample_value("useg_output_drift_psi", labels)


def test_answers_like_the_reference_have_no_drift_and_others_have() -> None:
    telemetry = watch(MIN_DRIFT_SAMPLES)
    assert read(telemetry, "segments") == 0.0
    assert read(telemetry, "void") == 0.0
    # All of it moved from one bin to another, whose empty shares count as 0.001: twice 0.999 ln 1000.
    assert round(read(telemetry, "score") or 0.0, 2) == 13.80


def test_too_few_answers_tell_nothing() -> None:
    assert read(watch(MIN_DRIFT_SAMPLES - 1), "segments") is None


def test_what_is_forgotten_is_told_no_more() -> None:
    telemetry = watch(MIN_DRIFT_SAMPLES)
    DriftMonitor(DESCRIBED, telemetry).forget()
    assert read(telemetry, "segments") is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("query", "series"),
    [("", 3), ("?task=instance,panoptic", 3), ("?task=instance", 0), ("?threshold=0.1", 0), ("?classes=1", 0)],
)
async def test_only_answers_made_as_the_reference_was_are_compared(query: str, series: int) -> None:
    def open_described() -> tuple[Contract, Session]:
        return DESCRIBED, RedSession()

    photo = save(draw_halves())
    async with open_client(open_described) as client:
        for _ in range(MIN_DRIFT_SAMPLES):
            answer = await client.post(f"/v1/segment{query}", content=photo, headers={"Content-Type": "image/png"})
            assert answer.status_code == 200
        assert (await client.get("/metrics")).text.count("\nuseg_output_drift_psi{") == series
