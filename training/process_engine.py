"""Several processes of this machine as the engine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from model.errors import TrainingError
from training.engines import Item, Worker
from training.progress import Progress


class ProcessEngine:
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
            initializer=_prepare,
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


def _prepare(worker: Worker[Any], threads: int) -> None:
    """Begin a process, which ends at once with Ctrl-C, or when the process that began it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    threadpool_limits(1, user_api="blas")
    _workers.append(worker)


def _work(stage: str, group: Sequence[Any]) -> int:
    (worker,) = _workers
    return sum(worker.work(stage, group))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
