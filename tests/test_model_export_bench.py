"""Summaries of times, and benchmarks of an artifact."""

from pathlib import Path

import pytest

from model.export.bench import BenchConfig, bench, summarize_times


def test_times_are_summarized_as_median_quartiles_and_rate() -> None:
    summary = summarize_times([0.5, 0.1, 0.2, 0.4, 0.3], [0.6], 3)
    assert summary == {"ms": 300.0, "quartiles_ms": [200.0, 400.0], "images_per_s": 5.0}


def test_an_artifact_is_timed_next_to_torch_for_every_batch_size(tiny_artifact: Path) -> None:
    report = bench(tiny_artifact, config=BenchConfig(backend="cpu", batch_sizes=(1, 2), rounds=2, threads=1))
    assert report["sessions"] == ["cpu", "torch"]
    assert [row["batch"] for row in report["batches"]] == [1, 2]
    for row in report["batches"]:
        low, high = row["fraction_of_torch"]["quartiles"]
        assert 0.0 < low <= row["fraction_of_torch"]["median"] <= high
        for backend in ("cpu", "torch"):
            low, high = row[backend]["quartiles_ms"]
            assert 0.0 < low <= row[backend]["ms"] <= high


@pytest.mark.slow
def test_streams_are_compared_with_one_stream_on_all_threads(tiny_artifact: Path) -> None:
    config = BenchConfig(backend="openvino", batch_sizes=(1,), rounds=2, threads=1, streams=2, baseline="openvino")
    report = bench(tiny_artifact, config=config)
    assert report["sessions"] == ["openvino-2-streams", "openvino"]
    assert {"fraction_of_openvino", "fraction_of_openvino_at_once"} <= set(report["batches"][0])


def test_torch_is_not_compared_with_itself(tiny_artifact: Path) -> None:
    report = bench(tiny_artifact, config=BenchConfig(backend="torch", batch_sizes=(1,), rounds=1, threads=1))
    assert report["sessions"] == ["torch"]
    assert "fraction_of_torch" not in report["batches"][0]
