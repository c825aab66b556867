"""Executors: run one stage of work over groups of items, in this process, in several, or on a Ray cluster."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from model.errors import ConfigError, TrainingError, UsegError
from model.progress import Progress
from training.option_types import PositiveInt

Item = TypeVar("Item")
_Item = TypeVar("_Item", contravariant=True)
_UNLIMITED = -1


class Worker(Protocol[_Item]):
    """A small picklable dataclass: it loads models in the process that runs it, and writes results to disk."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]
    """Name of one item, for the progress bar."""

    def work(self, stage: Any, group: Sequence[_Item], /) -> Iterator[int]:
        """Complete a stage for these items, skipping finished ones; yields how many items are done."""
        ...


class LocalExecutor:
    """Runs the groups one after the other in this process."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        """Run one stage over groups of items; returns when all results are on disk."""
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            for count in self._map(worker, stage, groups):
                progress.advance(count)

    def _map(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> Iterator[int]:
        """Yield how many items are done."""
        for group in groups:
            yield from worker.work(stage, group)


@dataclass(frozen=True)
class MultiprocessExecutor(LocalExecutor):
    """Runs the groups in processes that live for one stage.

    Raises what a process raised. If a process dies, all end and TrainingError is raised; running the same command again
    continues.
    """

    workers: int
    threads: int
    """CPU threads per process."""

    def _map(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> Iterator[int]:
        # A copy, without what was loaded here. Spawned: a fork of threads that hold locks may never continue.
        pool = ProcessPoolExecutor(
            min(self.workers, max(1, len(groups))),
            multiprocessing.get_context("spawn"),
            initializer=_init_process,
            initargs=(replace(worker), self.threads),
        )
        try:
            for each in as_completed([pool.submit(_work, stage, group) for group in groups]):
                yield each.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps out of memory: run the same command again to continue, "
                "with fewer --workers to use less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class RayExecutor(LocalExecutor):
    """Runs the groups on Ray actors that live for all stages. Needs the extra `ray`, and a shared file system.

    If an actor dies, its group is run again and skips what is already on disk. Raises what an actor raised, and
    TrainingError if Ray itself failed. Ray Data is not used: results go to disk, so there is no data for Ray to move,
    and one data set per stage would start the actors and load the encoder every time.
    """

    def __init__(self, threads: int, max_workers: int | None = None) -> None:
        """`threads` is the number of CPU threads per actor.

        Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine. Raises ConfigError without Ray.
        """
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--executor ray needs Ray ({error}): pip install 'useg[ray]'") from error
        self._ray = ray
        self._threads = threads
        self._max_workers = max_workers
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._worker: Worker[Any] | None = None
        self._actors: list[Any] = []

    def _map(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> Iterator[int]:
        from ray.util import ActorPool

        self._create_actors(worker, len(groups))
        try:
            yield from ActorPool(self._actors).map_unordered(
                lambda actor, group: actor.work.remote(stage, group), groups
            )
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UsegError) else error) from error
        except self._ray.exceptions.RayError as error:
            raise TrainingError(f"Ray failed: {error}") from error

    def _create_actors(self, worker: Worker[Any], groups: int) -> None:
        """Start as many actors as there are groups and the cluster has room for; once per worker."""
        if worker is not self._worker:
            self._worker, self._actors = worker, []
        room = int(self._ray.cluster_resources().get("CPU", 1)) // self._threads
        missing = max(1, min(groups, room, self._max_workers or room)) - len(self._actors)
        remote = self._ray.remote(num_cpus=self._threads, max_restarts=_UNLIMITED, max_task_retries=_UNLIMITED)
        # A copy, without what was loaded here: a restarted actor gets its arguments again.
        self._actors += [remote(_Actor).remote(replace(worker), self._threads) for _ in range(missing)]


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How the work of a command is spread over processes and machines."""

    executor: Literal["local", "ray"] = "local"
    """Processes on this machine, or a Ray cluster (extra `ray`)."""
    workers: PositiveInt | None = None
    """Number of processes (default: 1; with Ray as many as the cluster has room for)."""
    shard: str = "0/1"
    """Do only part I of N, given as I/N with I from 0, for job arrays; once all are done, run without --shard."""

    def make_executor(self, threads: int) -> LocalExecutor:
        """Raises ConfigError if Ray is requested and not installed."""
        if self.executor == "ray":
            return RayExecutor(threads, self.workers)
        return MultiprocessExecutor(self.workers, threads) if self.workers and self.workers > 1 else LocalExecutor()


ALL_SHARDS = slice(0, None, 1)


def parse_shard(text: str) -> slice:
    """Return the groups of a shard: `3/16` is every 16th, from the fourth on. Raises ConfigError if it is none."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"a shard must be given as INDEX/COUNT, such as 3/16 for the fourth of sixteen; got {text!r}")
    return slice(int(index), None, int(count))


class _Actor:
    """A process, which keeps what its worker loaded."""

    def __init__(self, worker: Worker[Any], threads: int) -> None:
        self._worker = worker
        torch.set_num_threads(threads)

    def work(self, stage: str, group: Sequence[Any]) -> int:
        with threadpool_limits(1, user_api="blas"):
            return sum(self._worker.work(stage, group))


_actors: list[_Actor] = []
"""The actor of a pool's process: its initializer has no other place to keep it."""


def _init_process(worker: Worker[Any], threads: int) -> None:
    """Set up a process, which exits at once on Ctrl-C or when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _actors.append(_Actor(worker, threads))


def _work(stage: str, group: Sequence[Any]) -> int:
    return _actors[0].work(stage, group)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
