"""`useg bench`: measures the speed of an artifact on a backend, next to another backend."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from jaxtyping import Int64, UInt8

from model.backends.loader import load_session
from model.backends.session import Backend, Session, find_hot_swap
from model.contract import GOLDEN_FILE
from model.errors import BackendUnavailable
from model.files import load_npz

_QUARTILES = (25, 50, 75)

BatchInputs = tuple[UInt8[np.ndarray, "B 3 H W"], Int64[np.ndarray, "B 2"]]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a benchmark."""

    backend: Backend = "auto"
    """What runs the network."""
    batch_sizes: tuple[PositiveInt, ...] = (1, 2, 3, 5, 8)
    """Batch sizes to time."""
    rounds: PositiveInt = 5
    """Timed runs of each backend and batch size."""
    threads: PositiveInt = 2
    """CPU threads."""
    streams: PositiveInt = 1
    """Runs at once on a CPU, each on `threads` threads."""
    baseline: Backend = "torch"
    """Backend to compare with, if it is installed, in one stream on all threads."""


_DEFAULTS = BenchConfig()


def bench(
    artifact: Annotated[Path, Parameter(name="ARTIFACT", help="Folder of the artifact.")],
    /,
    *,
    config: Annotated[BenchConfig, Parameter(name="*")] = _DEFAULTS,
) -> dict[str, Any]:
    """Measure how fast an artifact runs on a backend, alternating with another one.

    Prints median and quartiles of the time per batch of the golden images; with several streams, each round also times
    as many runs at once.
    """
    # In each round the sessions alternate, so that a change of load affects both; ratios are medians over the rounds.
    streams, all_threads = config.streams, config.threads * config.streams
    contract, session = load_session(artifact, backend=config.backend, threads=config.threads, streams=streams)
    if hot_swap := find_hot_swap(session):
        hot_swap.wait_ready()
    sessions = {session.backend if streams == 1 else f"{session.backend}-{streams}-streams": session}
    with contextlib.suppress(BackendUnavailable):
        other = load_session(artifact, backend=config.baseline, threads=all_threads)[1]
        sessions.setdefault(other.backend, other)
    inputs = {batch: repeat_golden_inputs(artifact, batch) for batch in config.batch_sizes}
    seconds = _time_rounds(sessions, inputs, config.rounds, 1)
    at_once = seconds if streams == 1 else _time_rounds(sessions, inputs, config.rounds, streams)
    name, *baselines = sessions
    return {
        "artifact": f"{contract.name} {contract.version}",
        "sessions": list(sessions),
        "threads": config.threads,
        "streams": streams,
        "rounds": config.rounds,
        "batches": [
            {
                "batch": batch,
                **{
                    each: summarize_times(seconds[each, batch], at_once[each, batch], streams * batch)
                    for each in sessions
                },
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


def summarize_times(seconds: Sequence[float], at_once: Sequence[float], images: int) -> dict[str, Any]:
    """Summarize the times of a batch as latency, and those of all `images` of runs at once as throughput."""
    low, median, high = np.percentile(seconds, _QUARTILES)
    return {
        "ms": round(median * 1e3, 3),
        "quartiles_ms": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "images_per_s": round(images / float(np.median(at_once)), 3),
    }


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


def _compare(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The time as a fraction of the baseline's, over the rounds."""
    low, median, high = np.percentile(np.array(seconds) / np.array(baseline), _QUARTILES)
    return {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
