"""Loggers of a training run: CSV with a plot, TensorBoard, and Prometheus' textfile format."""

import csv
import io
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from torch.utils.tensorboard import SummaryWriter

from model.files import append_text, atomic_write, report_disk_full

LOSSES_FILE = "losses.csv"
PLOT_FILE = "losses.png"
TENSORBOARD_FOLDER = "tensorboard"
TEXTFILE_INTERVAL_S = 5.0
"""Minimum time between two textfiles; Prometheus rarely scrapes more often."""
_COLUMNS = 3
_SMOOTHING = 0.02
"""Window of the running mean, as a fraction of the steps."""
_MAX_QUANTILE = 0.98
"""The y axis ends at this quantile, so that the high losses of the first steps do not flatten the curve."""


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


def read_csv_log(path: Path) -> dict[str, list[float]]:
    """Return the columns of a CSV log, with `step` among them; empty if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    return {name: [float(row[index] or "nan") for row in rows] for index, name in enumerate(header)}


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


def plot_losses(csv_log: Path, out: Path, title: str) -> None:
    """Save a PNG with one plot per column of a CSV log: the values in a light color, their running mean in a dark one.

    `total` comes first; a column without values gets an empty plot.
    """
    columns = read_csv_log(csv_log)
    steps = np.array(columns.pop("step", []))
    names = sorted(columns, key=lambda name: name != "total")
    rows = max(1, -(-len(names) // _COLUMNS))
    # Fixed margins: a layout engine would take seconds.
    figure = Figure(figsize=(4.5 * min(_COLUMNS, max(1, len(names))), 2.8 * rows + 0.4))
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.5 / (2.8 * rows), top=1.0 - 0.8 / (2.8 * rows), hspace=0.5)
    figure.suptitle(title)
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, _COLUMNS if len(names) > _COLUMNS else len(names), number)
        values = np.array(columns[name])
        is_known = np.isfinite(values)
        x, y = steps[is_known], values[is_known]
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.set_title(name)
        if len(y):
            mean = running_mean(y, max(1, round(_SMOOTHING * len(y))))
            axes.set_title(f"{name}: {mean[-1]:.4g}")
            axes.plot(x, y, color="lightsteelblue", linewidth=0.8)
            axes.plot(x, mean, color="tab:blue")
            axes.set_ylim(0.0, max(float(np.quantile(y, _MAX_QUANTILE)), 1e-9))
    with atomic_write(out) as sibling, sibling.open("wb") as stream:
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png")


def running_mean(values: Float[np.ndarray, "N"], window: int) -> Float[np.ndarray, "N"]:
    """Return the mean of each value and those before it, `window` in all or as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    means: Float[np.ndarray, "N"] = (sums[ends] - sums[starts]) / (ends - starts)
    return means
