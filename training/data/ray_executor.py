"""Executor on Ray: one machine, or a cluster with a shared file system. Needs the extra `ray`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.util import ActorPool
from threadpoolctl import threadpool_limits

from model.errors import TrainingError, UsegError
from model.progress import Progress
from training.data.executors import Item, Worker

_UNLIMITED = -1


class RayExecutor:
    """Runs the groups on actors that live for all stages.

    If an actor dies, its group is run again and skips what is already on disk. Ray Data is not used: results go to
    disk, so there is no data for Ray to move, and one data set per stage would start the actors and load the encoder
    every time.
    """

    def __init__(self, threads: int, max_workers: int | None = None) -> None:
        """`threads` is the number of CPU threads per actor.

        Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine.
        """
        self._threads = threads
        self._max_workers = max_workers
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._worker: Worker[Any] | None = None
        self._actors: list[Any] = []

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        """Raises what an actor raised, and TrainingError if Ray itself failed."""
        self._create_actors(worker, len(groups))
        pool = ActorPool(self._actors)
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            try:
                for count in pool.map_unordered(lambda actor, group: actor.work.remote(stage, group), groups):
                    progress.advance(count)
            except ray.exceptions.RayTaskError as error:
                raise _find_cause(error) from error
            except ray.exceptions.RayError as error:
                raise TrainingError(f"Ray failed: {error}") from error

    def _create_actors(self, worker: Worker[Any], groups: int) -> None:
        """Start as many actors as there are groups and the cluster has room for; once per worker."""
        if worker is not self._worker:
            self._worker, self._actors = worker, []
        room = int(ray.cluster_resources().get("CPU", 1)) // self._threads
        missing = max(1, min(groups, room, self._max_workers or room)) - len(self._actors)
        actor = ray.remote(num_cpus=self._threads, max_restarts=_UNLIMITED, max_task_retries=_UNLIMITED)(_Actor)
        # A copy, without what was loaded here: a restarted actor gets its arguments again.
        self._actors += [actor.remote(replace(worker), self._threads) for _ in range(missing)]


class _Actor:
    """A Ray process, which keeps what its worker loaded."""

    def __init__(self, worker: Worker[Any], threads: int) -> None:
        self._worker = worker
        torch.set_num_threads(threads)

    def work(self, stage: str, group: Sequence[Any]) -> int:
        with threadpool_limits(1, user_api="blas"):
            return sum(self._worker.work(stage, group))


def _find_cause(error: ray.exceptions.RayTaskError) -> Exception:
    """Return the UsegError inside Ray's error, or Ray's error itself."""
    cause = error.cause
    return cause if isinstance(cause, UsegError) else error
