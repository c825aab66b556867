"""The statistics extension of the Open Inference Protocol: what each version did since it was opened."""

from collections.abc import Sequence
from typing import Any

from service.artifact.pipeline import Pipeline
from service.telemetry.metrics import Stage
from service.telemetry.tally import Sum

_NANOSECONDS = 1e9
_STAGES: dict[str, Sequence[Stage]] = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("merge", "encode"),
}
"""Ours for each of the protocol's; they follow each other."""


def describe_statistics(pipeline: Pipeline) -> dict[str, Any]:
    """What a version has done; times in nanoseconds."""
    tally = pipeline.tally
    return {
        "name": tally.model,
        "version": tally.version,
        "last_inference": round(tally.last_answer_s * 1000),
        "inference_count": tally.stages["infer"].count,
        "execution_count": pipeline.engine.runs,
        "inference_stats": {
            "success": _describe(tally.answered),
            "fail": _describe(tally.failed),
            **{name: _describe(*(tally.stages[each] for each in stages)) for name, stages in _STAGES.items()},
            "cache_hit": _describe(Sum()),
            "cache_miss": _describe(Sum()),
        },
        "batch_stats": [],
    }


def _describe(*parts: Sum) -> dict[str, int]:
    """Times of parts that follow each other, and how often the last of them took place."""
    return {"count": parts[-1].count, "ns": round(sum(part.seconds for part in parts) * _NANOSECONDS)}
