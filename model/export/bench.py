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

from model.backends.loader import load_session
from model.backends.session import Backend, Session, find_hot_swap
from model.contract import GOLDEN_FILE
from model.errors import BackendUnavailable
from model.files import load_npz

_QUARTILES = (25, 50, 75)


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
    stored = load_npz(artifact / GOLDEN_FILE)
    batches = []
    for batch in config.batch_sizes:
        order = np.arange(batch) % len(stored["pixels"])
        inputs = stored["pixels"][order], stored["sizes"][order]
        seconds = _time_rounds(sessions, inputs, config.rounds, 1)
        at_once = seconds if streams == 1 else _time_rounds(sessions, inputs, config.rounds, streams)
        row: dict[str, Any] = {"batch": batch}
        for name in sessions:
            row[name] = summarize_times(seconds[name], at_once[name], streams * batch)
        for name in list(sessions)[1:]:
            row[f"fraction_of_{name}"] = _compare(seconds)
            if streams > 1:
                row[f"fraction_of_{name}_at_once"] = _compare(at_once)
        batches.append(row)
    return {
        "artifact": f"{contract.name} {contract.version}",
        "sessions": list(sessions),
        "threads": config.threads,
        "streams": streams,
        "rounds": config.rounds,
        "batches": batches,
    }


def summarize_times(seconds: Sequence[float], at_once: Sequence[float], images: int) -> dict[str, Any]:
    """Summarize the times of a batch as latency, and those of all `images` of runs at once as throughput."""
    low, median, high = np.percentile(seconds, _QUARTILES)
    return {
        "ms": round(median * 1e3, 3),
        "quartiles_ms": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "images_per_s": round(images / float(np.median(at_once)), 3),
    }


def _time_rounds(
    sessions: dict[str, Session], inputs: tuple[np.ndarray, np.ndarray], rounds: int, runs: int
) -> dict[str, list[float]]:
    """Seconds of each round of that many runs at once, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    with ThreadPoolExecutor(runs) as pool:
        for _ in range(rounds + 1):
            for name, session in sessions.items():
                started = time.perf_counter()
                list(pool.map(session.run, *([each] * runs for each in inputs)))
                seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def _compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The times of the first session as fractions of the second one's, over the rounds."""
    own, baseline = (np.array(values) for values in seconds.values())
    low, median, high = np.percentile(own / baseline, _QUARTILES)
    return {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
