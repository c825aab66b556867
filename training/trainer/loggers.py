"""Loggers of a training run: CSV, TensorBoard, and Prometheus' textfile format."""

import csv
import io
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from torch.utils.tensorboard import SummaryWriter

from model.files import append_text, atomic_write, report_disk_full

LOSSES_FILE = "losses.csv"
TENSORBOARD_FOLDER = "tensorboard"
TEXTFILE_INTERVAL_S = 5.0
"""Minimum time between two textfiles; Prometheus rarely scrapes more often."""


class Logger(ABC):
    """A destination of the losses of a training run."""

    @abstractmethod
    def log(self, step: int, losses: Mapping[str, float], left_s: float, *, is_last: bool) -> None:
        """Record the losses of a step; `left_s` is the estimated time to the end."""

    def mark_failed(self) -> None:
        """Record that the run stopped because a loss or gradient was not finite."""
        self.close()

    def flush(self) -> None:  # noqa: B027 (optional)
        """Write what is buffered."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Release the destination; a later `log` opens it again."""


class CsvLogger(Logger):
    """A CSV file with a row for each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, step: int, losses: Mapping[str, float], left_s: float = math.nan, *, is_last: bool = False) -> None:
        """Append a row. The first row defines the columns; a term that appears later is not stored."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        rows = io.StringIO(newline="")
        writer = csv.DictWriter(rows, ["step", *losses] if is_new else self._read_header(), extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow({"step": step, **{name: f"{value:.5f}" for name, value in losses.items()}})
        append_text(self.path, rows.getvalue())

    def _read_header(self) -> list[str]:
        with self.path.open(newline="") as stream:
            return next(csv.reader(stream))

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps, which a resumed run computes again."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        with atomic_write(self.path) as sibling, sibling.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *(row for row in rows if int(row[0]) <= step)])


class TensorBoardLogger(Logger):
    """Scalars for TensorBoard: `loss/<term>` by step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def log(self, step: int, losses: Mapping[str, float], left_s: float = math.nan, *, is_last: bool = False) -> None:
        """Add the losses; events of an earlier process at this step or later are marked as obsolete."""
        with report_disk_full(self._folder):
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            for term, value in losses.items():
                self._writer.add_scalar(f"loss/{term}", value, step)

    def flush(self) -> None:
        """Write what is buffered to the event file."""
        if self._writer is not None:
            with report_disk_full(self._folder):
                self._writer.flush()

    def close(self) -> None:
        """Write and close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with report_disk_full(self._folder):
                writer.close()


class PrometheusTextfileLogger(Logger):
    """A file for the textfile collector of Prometheus' node_exporter, replaced atomically."""

    def __init__(self, path: Path, run: Path, max_steps: int) -> None:
        """The collector reads only files that end in .prom."""
        self._path = path
        self._run = str(run)
        self._registry = CollectorRegistry()
        self._step = self._gauge("useg_train_step", "Finished optimizer steps.")
        self._left = self._gauge("useg_train_seconds_left", "Estimated seconds to the end of the run.")
        self._failed = self._gauge("useg_train_not_finite", "1 if the run stopped at a loss or gradient not finite.")
        self._losses = self._gauge("useg_train_loss", "Loss terms and other values of the last step.", "term")
        self._updated = self._gauge("useg_train_updated_timestamp_seconds", "Time of the last update.")
        self._gauge("useg_train_max_steps", "Optimizer steps of the whole run.").labels(self._run).set(max_steps)
        self._written_at = -math.inf

    def log(self, step: int, losses: Mapping[str, float], left_s: float, *, is_last: bool) -> None:
        """Write the file, at most every `TEXTFILE_INTERVAL_S` seconds."""
        now = time.monotonic()
        if now - self._written_at < TEXTFILE_INTERVAL_S and not is_last:
            return
        self._written_at = now
        self._step.labels(self._run).set(step)
        self._left.labels(self._run).set(left_s)
        for term, value in losses.items():
            self._losses.labels(self._run, term).set(value)
        self._write(has_failed=False)

    def mark_failed(self) -> None:
        """Set `useg_train_not_finite`; the other values stay those of the last update."""
        self._write(has_failed=True)

    def _write(self, *, has_failed: bool) -> None:
        self._failed.labels(self._run).set(has_failed)
        self._updated.labels(self._run).set_to_current_time()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with report_disk_full(self._path):
            write_to_textfile(str(self._path), self._registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(name, documentation, ("run", *labels), registry=self._registry)
