"""Summaries of times, and benchmarks of an artifact."""

from pathlib import Path

import pytest
import torch

from model.export.bench import BenchConfig, measure_memory, repeat_golden_inputs, run_bench, summarize_times


def test_times_are_summarized_as_median_quartiles_and_rates() -> None:
    figures = summarize_times([0.5, 0.1, 0.2, 0.4, 0.3], batch=3, flops=10_000_000_000, peak_tflops=1.0)
    assert figures == {
        "ms": 300.0,
        "quartiles_ms": [200.0, 400.0],
        "images_per_s": 10.0,
        "gflops_per_s": 100.0,
        "fraction_of_peak": 0.1,
    }


def test_unknown_flops_and_peak_are_omitted() -> None:
    assert set(summarize_times([0.5], batch=1, flops=None, peak_tflops=1.0)) == {"ms", "quartiles_ms", "images_per_s"}
    assert "fraction_of_peak" not in summarize_times([0.5], batch=1, flops=1, peak_tflops=None)


def test_golden_images_fill_a_batch_of_any_size(tiny_artifact: Path) -> None:
    pixels, sizes = repeat_golden_inputs(tiny_artifact, 5)
    assert (len(pixels), len(sizes)) == (5, 5)
    assert (pixels[4] == pixels[0]).all()
    assert (pixels[1] != pixels[0]).any()


def test_an_artifact_is_timed_next_to_torch_for_every_batch_size(tiny_artifact: Path) -> None:
    threads = torch.get_num_threads()
    report = run_bench(tiny_artifact, BenchConfig(backend="cpu", batch_sizes=(1, 2), rounds=2, threads=1))
    torch.set_num_threads(threads)
    assert report["sessions"] == ["cpu", "torch"]
    assert [row["batch"] for row in report["batches"]] == [1, 2]
    for row in report["batches"]:
        low, high = row["fraction_of_torch"]["quartiles"]
        assert 0.0 < low <= row["fraction_of_torch"]["median"] <= high
        for backend in ("cpu", "torch"):
            low, high = row[backend]["quartiles_ms"]
            assert 0.0 < low <= row[backend]["ms"] <= high
            assert row[backend]["memory_bytes"] >= 0


@pytest.mark.slow
def test_streams_are_compared_with_one_stream_on_all_threads(tiny_artifact: Path) -> None:
    config = BenchConfig(backend="openvino", batch_sizes=(1,), rounds=2, threads=1, streams=2, baseline="openvino")
    report = run_bench(tiny_artifact, config)
    assert report["sessions"] == ["openvino-2-streams", "openvino"]
    assert {"fraction_of_openvino", "fraction_of_openvino_at_once"} <= set(report["batches"][0])


def test_torch_is_not_compared_with_itself(tiny_artifact: Path) -> None:
    threads = torch.get_num_threads()
    report = run_bench(tiny_artifact, BenchConfig(backend="torch", batch_sizes=(1,), rounds=1, threads=1))
    torch.set_num_threads(threads)
    assert report["sessions"] == ["torch"]
    assert "fraction_of_torch" not in report["batches"][0]


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_memory_of_a_gpu_is_not_measured(tiny_artifact: Path, backend: str) -> None:
    assert measure_memory(tiny_artifact, backend, 1, 1) is None
