"""Kills a Ray actor while it works."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest


@contextmanager
def lose_an_actor(folder: Path, pattern: str) -> Iterator[list[int]]:
    """Run Ray with two CPUs and send SIGKILL to one actor as soon as a file in the folder matches the pattern.

    Yields a list that then holds the id of the killed process. Skips if Ray is not installed.
    """
    ray = pytest.importorskip("ray", reason="useg[ray] is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    victims: list[int] = []
    watcher = threading.Thread(target=_kill_one, args=(folder, pattern, victims), daemon=True)
    watcher.start()
    try:
        yield victims
        watcher.join()
    finally:
        ray.shutdown()


def _kill_one(folder: Path, pattern: str, victims: list[int]) -> None:
    while not any(folder.glob(pattern)):
        time.sleep(0.005)
    processes = psutil.Process().children(recursive=True)
    victims.append(next(each.pid for each in processes if "ray::_Actor" in " ".join(each.cmdline())))
    os.kill(victims[0], signal.SIGKILL)
