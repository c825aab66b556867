"""What carries the work on many photos: this process alone, or several beside each other."""

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
from training.progress import Progress

Item = TypeVar("Item")
_Item = TypeVar("_Item", contravariant=True)


class Worker(Protocol[_Item]):
    """A dataclass that is sent to each process: small, it opens there what is large, and what it makes goes to disk."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]
    """What an item is called."""

    def work(self, stage: Any, group: Sequence[_Item], /) -> Iterator[int]:
        """Do what a stage, of which each worker has its own, lacks for these items; gives how many are done."""
        ...


class Executor(Protocol):
    """Runs one stage over groups of items, and returns once all is on disk."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None: ...


class LocalExecutor:
    """One group after the other, here."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            for group in groups:
                for count in worker.work(stage, group):
                    progress.advance(count)


@dataclass(frozen=True)
class JobShard:
    """One of `count` equal parts of the work, counted from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ConfigError(f"a part is one of 0/{self.count} to {self.count - 1}/{self.count}, not {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def choose(self, groups: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th group."""
        return groups[self.number :: self.count]


ALL_SHARDS = JobShard(0, 1)


def parse_shard(text: str) -> JobShard:
    """The part that `3/16` names. Raises ConfigError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(count)):
        raise ConfigError(f"a part is given as 3/16, the fourth of sixteen; got {text!r}")
    return JobShard(int(number), int(count))


class MultiprocessExecutor:
    """Processes that live as long as a stage; where one dies, all end, and the same command goes on."""

    def __init__(self, workers: int, threads: int) -> None:
        """So many processes, each with `threads` of the CPU."""
        self._workers = workers
        self._threads = threads

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        """Raises what a process raised, and TrainingError if one died."""
        if not groups:
            return
        # A copy, without what was opened here. Spawned: a fork of threads that hold locks may wait for ever.
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
                "a process died, perhaps for lack of memory: the same command goes on, fewer --workers need less"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_workers: list[Worker[Any]] = []
"""This process', if it is one of an engine's: a pool gives its initialiser no other place."""


def _init_process(worker: Worker[Any], threads: int) -> None:
    """Begin a process, which ends at once with Ctrl-C, or when the process that began it is gone."""
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
