"""Options of commands whose work can be spread over processes and machines."""

from dataclasses import dataclass
from typing import Literal

from model.errors import ConfigError
from training.data.executors import Executor, LocalExecutor, MultiprocessExecutor


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How the work is spread."""

    executor: Literal["local", "ray"] = "local"
    """Processes on this machine, or a Ray cluster (extra `ray`)."""
    workers: int | None = None
    """Number of processes (default: 1; with Ray as many as the cluster has room for)."""
    shard: str = "0/1"
    """Do only part I of N, given as I/N with I from 0, for job arrays; once all are done, run without --shard."""

    def make_executor(self, threads: int) -> Executor:
        """Raises ConfigError if Ray is requested and not installed."""
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers must be positive, got {self.workers}")
        if self.executor == "ray":
            try:
                from training.data.ray_executor import RayExecutor
            except ImportError as error:
                raise ConfigError(f"--executor ray needs Ray ({error}): pip install 'useg[ray]'") from error
            return RayExecutor(threads, self.workers)
        return MultiprocessExecutor(self.workers, threads) if self.workers and self.workers > 1 else LocalExecutor()
