"""What commands share whose work may be carried by several processes."""

import argparse
from typing import TYPE_CHECKING

from model.command import positive
from model.errors import ConfigError

if TYPE_CHECKING:
    from training.data.executors import Executor

ENGINES = ("local", "ray")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options that say what carries the work; for `open_engine`."""
    parser.add_argument("--engine", choices=ENGINES, default="local", help="ray: on a cluster of Ray (extra `ray`)")
    parser.add_argument(
        "--workers", type=positive, help="processes, of --threads each (1; with Ray as many as there is room for)"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="one of N parts, from 0; then once without")


def open_engine(options: argparse.Namespace) -> "Executor":
    """Raises ConfigError if Ray is wished and not installed."""
    if options.engine == "ray":
        try:
            from training.data.ray_executor import RayExecutor
        except ImportError as error:
            raise ConfigError(f"--engine ray needs Ray ({error}): pip install 'useg[ray]'") from error
        return RayExecutor(options.threads, options.workers)
    if options.workers and options.workers > 1:
        from training.data.executors import MultiprocessExecutor

        return MultiprocessExecutor(options.workers, options.threads)
    from training.data.executors import LocalExecutor

    return LocalExecutor()
