"""Measures the speed of an artifact on a backend, next to another backend."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from model.backends.loader import load_session
from model.backends.onnx_runtime import OnnxSession
from model.backends.openvino import OpenvinoSession
from model.backends.session import Backend, Session, find_hot_swap
from model.contract import GOLDEN_FILE, INT8_FILES, NETWORK_FILE, Contract, read_contract
from model.errors import BackendUnavailable
from model.files import load_npz

_STATUS = Path("/proc/self/status")
_PEAK_RESET = Path("/proc/self/clear_refs")
_PEAK = "VmHWM:"
_QUARTILES = (25, 50, 75)

BatchInputs = tuple[UInt8[np.ndarray, "B 3 H W"], Int64[np.ndarray, "B 2"]]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a benchmark."""

    backend: Backend = "auto"
    batch_sizes: tuple[int, ...] = (1, 2, 3, 5, 8)
    rounds: int = 5
    """Timed runs of each backend and batch size."""
    threads: int = 2
    streams: int = 1
    """Runs at once, each on `threads` threads."""
    baseline: Backend = "torch"
    """Backend to compare with, if it is installed; it has one stream with all threads."""
    peak_tflops: float | None = None
    """Peak performance of the hardware, to report the fraction that is reached; None: unknown."""


def run_bench(artifact: Path, config: BenchConfig) -> dict[str, Any]:
    """Measure the median and quartiles of the time per batch, on the backend and on the baseline if it is installed.

    In each round the two alternate, so that a change of load affects both; their ratio is the median over the rounds.
    With several streams, each round also times as many runs at once.
    The images are the golden ones. Memory is the growth of the peak of a new process in its first run.
    """
    streams, all_threads = config.streams, config.threads * config.streams
    contract, session = load_session(artifact, backend=config.backend, threads=config.threads, streams=streams)
    if hot_swap := find_hot_swap(session):
        hot_swap.wait_ready()
    sessions = {session.backend if streams == 1 else f"{session.backend}-{streams}-streams": session}
    with contextlib.suppress(BackendUnavailable):
        other = load_session(artifact, backend=config.baseline, threads=all_threads)[1]
        sessions.setdefault(other.backend, other)
    flops = _count_flops(contract)
    inputs = {batch: repeat_golden_inputs(artifact, batch) for batch in config.batch_sizes}
    seconds = _time_rounds(sessions, inputs, config.rounds, 1)
    at_once = seconds if streams == 1 else _time_rounds(sessions, inputs, config.rounds, streams)

    def summarize(name: str, batch: int) -> dict[str, Any]:
        return {
            **summarize_times(seconds[name, batch], batch, flops, config.peak_tflops),
            "images_per_s": _images_per_s(at_once[name, batch], streams * batch),
            "memory_bytes": measure_memory(artifact, sessions[name].backend, batch, all_threads),
        }

    name, *baselines = sessions
    return {
        "artifact": f"{contract.name} {contract.version}",
        "sessions": list(sessions),
        "threads": config.threads,
        "streams": streams,
        "rounds": config.rounds,
        "flops_per_image": flops,
        "batches": [
            {
                "batch": batch,
                **{each: summarize(each, batch) for each in sessions},
                **{
                    f"fraction_of_{each}{suffix}": _compare(times[name, batch], times[each, batch])
                    for each in baselines
                    for suffix, times in ({"": seconds} | ({"_at_once": at_once} if streams > 1 else {})).items()
                },
            }
            for batch in config.batch_sizes
        ],
    }


def repeat_golden_inputs(artifact: Path, batch: int) -> BatchInputs:
    """Repeat the artifact's golden images to a batch of that size."""
    stored = load_npz(artifact / GOLDEN_FILE)
    order = np.arange(batch) % len(stored["pixels"])
    return stored["pixels"][order], stored["sizes"][order]


def summarize_times(
    seconds: Sequence[float], batch: int, flops: int | None, peak_tflops: float | None
) -> dict[str, Any]:
    """Summarize the times of a batch as latency, throughput and fraction of the peak."""
    low, median, high = np.percentile(seconds, _QUARTILES)
    summary: dict[str, Any] = {
        "ms": round(median * 1e3, 3),
        "quartiles_ms": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "images_per_s": _images_per_s(seconds, batch),
    }
    if flops is not None:
        summary["gflops_per_s"] = round(batch * flops / median / 1e9, 1)
        if peak_tflops is not None:
            summary["fraction_of_peak"] = round(batch * flops / median / (peak_tflops * 1e12), 4)
    return summary


def measure_memory(artifact: Path, backend: str, batch: int, threads: int) -> int | None:
    """Measure by how many bytes the peak memory of a new process grows in its first run of that batch size.

    None for a backend that computes on a GPU, and on a system other than Linux.
    """
    if backend not in ("cpu", "openvino", "openvino-int8", "torch") or not _STATUS.is_file():
        return None
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_peak_growth, artifact, backend, batch, threads).result()


def _measure_peak_growth(artifact: Path, backend: str, batch: int, threads: int) -> int:
    pixels, sizes = repeat_golden_inputs(artifact, batch)
    session = _load_without_run(artifact, backend, threads)
    with contextlib.suppress(OSError):
        _PEAK_RESET.write_text("5")  # loading takes more than it keeps: reset the peak
    before = _read_peak()
    session.run(pixels, sizes)
    return _read_peak() - before


def _load_without_run(artifact: Path, backend: str, threads: int) -> Session:
    """Load a session without running it: comparing golden outputs would use memory first."""
    if backend == "cpu":
        return OnnxSession(artifact / NETWORK_FILE, threads=threads)
    if backend in ("openvino", "openvino-int8"):
        return OpenvinoSession(artifact / (NETWORK_FILE if backend == "openvino" else INT8_FILES[0]), threads=threads)
    from model.backends.torch_session import load_torch_session

    return load_torch_session(read_contract(artifact), artifact, threads=threads)


def _read_peak() -> int:
    """Peak memory of this process in bytes; unlike `ru_maxrss`, without that of its parent."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(_PEAK))
    return int(line.removeprefix(_PEAK).removesuffix("kB")) * 1024


def _count_flops(contract: Contract) -> int | None:
    """Floating-point operations for one image of the first input size; None without torch."""
    try:
        from model.backends.onnx_to_torch import count_artifact_flops
    except ModuleNotFoundError:
        return None
    return count_artifact_flops(contract)


def _time_rounds(
    sessions: dict[str, Session], inputs: dict[int, BatchInputs], rounds: int, runs: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each round of that many runs at once, after one warm-up round."""
    seconds: dict[tuple[str, int], list[float]] = {}
    with ThreadPoolExecutor(runs) as pool:
        for _ in range(rounds + 1):
            for batch, images in inputs.items():
                for name, session in sessions.items():
                    started = time.perf_counter()
                    list(pool.map(session.run, *([each] * runs for each in images)))
                    seconds.setdefault((name, batch), []).append(time.perf_counter() - started)
    return {key: values[1:] for key, values in seconds.items()}


def _images_per_s(seconds: Sequence[float], images: int) -> float:
    return round(images / float(np.median(seconds)), 3)


def _compare(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The time as a fraction of the baseline's, over the rounds."""
    low, median, high = np.percentile(np.array(seconds) / np.array(baseline), _QUARTILES)
    return {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
