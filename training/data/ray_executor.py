"""Ray as the engine: many groups of photos at once, on one machine or on a cluster with one file system."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.util import ActorPool
from threadpoolctl import threadpool_limits

from model.errors import TrainingError, UsegError
from training.data.executors import Item, Worker
from training.progress import Progress

_FOREVER = -1


class RayExecutor:
    """Actors that stay for all stages; where one dies, its group is done again, and finds what was already written.

    Not Ray Data: what a group makes goes to disk, so there is no data for Ray to move, and a data set of its own for
    each stage would start the actors, torch and the network each time.
    """

    def __init__(self, threads: int, most: int | None = None) -> None:
        """`threads` of the CPU for each actor, of which there are at most so many.

        Joins the cluster that `RAY_ADDRESS` names, else starts one here.
        """
        self._threads = threads
        self._most = most
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._worker: Worker[Any] | None = None
        self._actors: list[Any] = []

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        """Raises what an actor raised, and TrainingError if Ray itself failed."""
        self._hire(worker, len(groups))
        pool = ActorPool(self._actors)
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            try:
                for count in pool.map_unordered(lambda actor, group: actor.work.remote(stage, group), groups):
                    progress.advance(count)
            except ray.exceptions.RayTaskError as error:
                raise _find_cause(error) from error
            except ray.exceptions.RayError as error:
                raise TrainingError(f"Ray failed: {error}") from error

    def _hire(self, worker: Worker[Any], groups: int) -> None:
        """As many actors as the cluster has room for, once."""
        if worker is not self._worker:
            self._worker, self._actors = worker, []
        room = int(ray.cluster_resources().get("CPU", 1)) // self._threads
        wanted = max(1, min(groups, room, self._most or room)) - len(self._actors)
        actor = ray.remote(num_cpus=self._threads, max_restarts=_FOREVER, max_task_retries=_FOREVER)(_Actor)
        # A copy, without what was opened here: an actor that is started again gets its arguments again.
        self._actors += [actor.remote(replace(worker), self._threads) for _ in range(wanted)]


class _Actor:
    """A process of Ray's, which keeps open what its worker opened."""

    def __init__(self, worker: Worker[Any], threads: int) -> None:
        self._worker = worker
        torch.set_num_threads(threads)

    def work(self, stage: str, group: Sequence[Any]) -> int:
        with threadpool_limits(1, user_api="blas"):
            return sum(self._worker.work(stage, group))


def _find_cause(error: ray.exceptions.RayTaskError) -> Exception:
    """Our own error inside Ray's, if it is one."""
    cause = error.cause
    return cause if isinstance(cause, UsegError) else error
