"""The statistics extension of the Open Inference Protocol, read from our own metrics."""

from collections.abc import Sequence
from typing import Any

from model.contract import Contract
from service.telemetry import Stage, Telemetry

_NANOSECONDS = 1e9
_STAGES: dict[str, Sequence[Stage]] = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("merge", "encode"),
}


def describe_statistics(contract: Contract, telemetry: Telemetry, routes: Sequence[str]) -> dict[str, Any]:
    """What the artifact has done since the process began, over all these routes; times in nanoseconds."""
    stages = {name: _measure_stages(telemetry, parts) for name, parts in _STAGES.items()}
    success, failure = _measure_requests(telemetry, routes)
    runs = sum(
        sample.value
        for metric in telemetry.batch_size.collect()
        for sample in metric.samples
        if sample.name.endswith("_count")
    )
    nothing = {"count": 0, "ns": 0}
    return {
        "model_stats": [
            {
                "name": contract.name,
                "version": contract.version,
                "last_inference": round(telemetry.last_inference_s * 1000),
                "inference_count": stages["compute_infer"]["count"],
                "execution_count": int(runs),
                "inference_stats": {
                    "success": success,
                    "fail": failure,
                    **stages,
                    "cache_hit": nothing,
                    "cache_miss": nothing,
                },
                "batch_stats": [],
            }
        ]
    }


def _measure_stages(telemetry: Telemetry, stages: Sequence[Stage]) -> dict[str, int]:
    """Count and nanoseconds of stages that follow each other."""
    count, seconds = 0.0, 0.0
    for stage in stages:
        labels: dict[str, str] = {"stage": stage}
        count = telemetry.registry.get_sample_value("seg_stage_duration_seconds_count", labels) or 0.0
        seconds += telemetry.registry.get_sample_value("seg_stage_duration_seconds_sum", labels) or 0.0
    return {"count": int(count), "ns": round(seconds * _NANOSECONDS)}


def _measure_requests(telemetry: Telemetry, routes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Count and nanoseconds of requests that were answered, and of those that failed."""
    totals = {True: {"count": 0, "ns": 0}, False: {"count": 0, "ns": 0}}
    for metric in telemetry.request_seconds.collect():
        for sample in metric.samples:
            if sample.labels["route"] not in routes or sample.labels["method"] != "POST":
                continue
            total = totals[int(sample.labels["status"]) < 400]
            if sample.name.endswith("_count"):
                total["count"] += int(sample.value)
            elif sample.name.endswith("_sum"):
                total["ns"] += round(sample.value * _NANOSECONDS)
    return totals[True], totals[False]
