"""Ray as the engine of labels: many groups of photos at once, on one machine or on a cluster with one file system."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.util import ActorPool
from threadpoolctl import threadpool_limits

from model.errors import LabelStoreError, UsegError
from training.labels.workshop import Group, Stage, Workshop
from training.progress import Progress

_FOREVER = -1


class RayEngine:
    """Actors that stay for all stages; where one dies, its group is done again, and finds what was already written.

    Not Ray Data: what a group makes goes to the store, so there is no data for Ray to move, and a data set of its own
    for each stage would start the actors, torch and the encoder each time.
    """

    def __init__(self, threads: int) -> None:
        """`threads` of the CPU for each actor; joins the cluster that `RAY_ADDRESS` names, else starts one here."""
        self._threads = threads
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._actors: list[Any] = []

    def run(self, workshop: Workshop, stage: Stage, groups: Sequence[Group]) -> None:
        """Raises what an actor raised, and LabelStoreError if Ray itself failed."""
        self._hire(workshop, len(groups))
        pool = ActorPool(self._actors)
        with Progress(stage, sum(map(len, groups)), unit="photo") as progress:
            try:
                for count in pool.map_unordered(lambda actor, group: actor.work.remote(stage, group), groups):
                    progress.advance(count)
            except ray.exceptions.RayTaskError as error:
                raise _find_cause(error) from error
            except ray.exceptions.RayError as error:
                raise LabelStoreError(f"Ray failed: {error}") from error

    def _hire(self, workshop: Workshop, most: int) -> None:
        """As many actors as the cluster has room for, once."""
        room = int(ray.cluster_resources().get("CPU", 1)) // self._threads
        wanted = max(1, min(most, room)) - len(self._actors)
        actor = ray.remote(num_cpus=self._threads, max_restarts=_FOREVER, max_task_retries=_FOREVER)(_Worker)
        # A copy, without the encoder that was opened here: an actor that is started again gets its arguments again.
        self._actors += [actor.remote(replace(workshop), self._threads) for _ in range(wanted)]


class _Worker:
    """A process of Ray's, which keeps the encoder open."""

    def __init__(self, workshop: Workshop, threads: int) -> None:
        self._workshop = workshop
        torch.set_num_threads(threads)

    def work(self, stage: Stage, group: Group) -> int:
        with threadpool_limits(1, user_api="blas"):
            return sum(self._workshop.work(stage, group))


def _find_cause(error: ray.exceptions.RayTaskError) -> Exception:
    """Our own error inside Ray's, if it is one."""
    cause = error.cause
    return cause if isinstance(cause, UsegError) else error
