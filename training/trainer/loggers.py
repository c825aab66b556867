"""Logs of a training run: CSV, TensorBoard, and Prometheus' textfile format."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from torch.utils.tensorboard import SummaryWriter

from model.files import append_text, replace_file, report_disk_full

LOSSES_FILE = "losses.csv"
TENSORBOARD_FOLDER = "tensorboard"
TEXTFILE_INTERVAL_S = 5.0
"""Minimum time between two textfiles; Prometheus rarely scrapes more often."""


class PrometheusTextfileLogger:
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


class RunLogger:
    """Writes the losses of a run to `losses.csv`, to TensorBoard as `loss/<term>`, and to a textfile if given."""

    def __init__(self, run: Path, step: int, max_steps: int, textfile: Path | None = None) -> None:
        """Remove the rows of steps after `step`, which a resumed run computes again."""
        self._textfile = PrometheusTextfileLogger(textfile, run, max_steps) if textfile else None
        self._csv, self._folder = run / LOSSES_FILE, run / TENSORBOARD_FOLDER
        self._writer: SummaryWriter | None = None
        if self._csv.exists():
            header, *rows = self._csv.read_text().splitlines(keepends=True)
            replace_file(self._csv, header + "".join(row for row in rows if int(row.split(",")[0]) <= step))

    def log(self, step: int, losses: Mapping[str, float], left_s: float, *, is_last: bool) -> None:
        """Record the losses of a step; `left_s` is the estimated time to the end.

        TensorBoard's events of an earlier process from this step on become obsolete.
        """
        self._csv.parent.mkdir(parents=True, exist_ok=True)
        header = "" if self._csv.exists() else ",".join(["step", *losses]) + "\n"
        append_text(self._csv, header + ",".join([str(step), *(f"{value:.5f}" for value in losses.values())]) + "\n")
        with report_disk_full(self._folder):
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            for term, value in losses.items():
                self._writer.add_scalar(f"loss/{term}", value, step)
        if self._textfile is not None:
            self._textfile.log(step, losses, left_s, is_last=is_last)

    def mark_failed(self) -> None:
        """Record that the run stopped because a loss or gradient was not finite."""
        if self._textfile is not None:
            self._textfile.mark_failed()

    def flush(self) -> None:
        """Write the events that are buffered."""
        if self._writer is not None:
            with report_disk_full(self._folder):
                self._writer.flush()

    def close(self) -> None:
        """Write the events that are buffered; a later `log` opens another file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with report_disk_full(self._folder):
                writer.close()
