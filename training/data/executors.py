"""Executors: run one stage of work over groups of items, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from model.errors import ConfigError, TrainingError
from model.progress import Progress

Item = TypeVar("Item")
_Item = TypeVar("_Item", contravariant=True)


class Worker(Protocol[_Item]):
    """A small picklable dataclass: it loads models in the process that runs it, and writes results to disk."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]
    """Name of one item, for the progress bar."""

    def work(self, stage: Any, group: Sequence[_Item], /) -> Iterator[int]:
        """Complete a stage for these items, skipping finished ones; yields how many items are done."""
        ...


class Executor(Protocol):
    """Runs one stage over groups of items; returns when all results are on disk."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None: ...


class LocalExecutor:
    """Runs the groups one after the other in this process."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            for group in groups:
                for count in worker.work(stage, group):
                    progress.advance(count)


class MultiprocessExecutor:
    """Runs the groups in processes that live for one stage.

    If a process dies, all end; running the same command again continues.
    """

    def __init__(self, workers: int, threads: int) -> None:
        """`threads` is the number of CPU threads per process."""
        self._workers = workers
        self._threads = threads

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        """Raises what a process raised, and TrainingError if one died."""
        if not groups:
            return
        # A copy, without what was loaded here. Spawned: a fork of threads that hold locks may never continue.
        pool = ProcessPoolExecutor(
            min(self._workers, len(groups)),
            multiprocessing.get_context("spawn"),
            initializer=_init_process,
            initargs=(replace(worker), self._threads),
        )
        try:
            with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
                for each in as_completed([pool.submit(_work, stage, group) for group in groups]):
                    progress.advance(each.result())
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps out of memory: run the same command again to continue, "
                "with fewer --workers to use less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class JobShard:
    """Part `index` of `count` parts of the work, for job arrays."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"a shard must be one of 0/{self.count} to {self.count - 1}/{self.count}, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def choose(self, groups: Sequence[Item]) -> Sequence[Item]:
        """Return every `count`-th group, starting at `index`."""
        return groups[self.index :: self.count]


ALL_SHARDS = JobShard(0, 1)


def parse_shard(text: str) -> JobShard:
    """Parse `3/16`. Raises ConfigError for anything else."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(count)):
        raise ConfigError(f"a shard must be given as INDEX/COUNT, such as 3/16 for the fourth of sixteen; got {text!r}")
    return JobShard(int(index), int(count))


_workers: list[Worker[Any]] = []
"""The worker of a pool's process: its initializer has no other place to keep it."""


def _init_process(worker: Worker[Any], threads: int) -> None:
    """Set up a process, which exits at once on Ctrl-C or when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    threadpool_limits(1, user_api="blas")
    _workers.append(worker)


def _work(stage: str, group: Sequence[Any]) -> int:
    (worker,) = _workers
    return sum(worker.work(stage, group))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
