"""How far a fit is, in Prometheus' text format: for the textfile collector of its node_exporter."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

EVERY_S = 5.0
"""Between two files: Prometheus seldom looks more often."""


class FitGauges:
    """A file that is written whole or not at all, as the collector wants it."""

    def __init__(self, path: Path, run: Path, steps: int) -> None:
        """`path` ends in .prom, or the collector will not read it."""
        self._path = path
        self._run = str(run)
        self._registry = CollectorRegistry()
        self._step = self._make("seg_fit_step", "Steps that are done.")
        self._left_s = self._make("seg_fit_seconds_left", "Seconds to the end, at the pace so far.")
        self._is_broken = self._make(
            "seg_fit_not_finite", "1 if the fit ended at a loss or gradient that is no number."
        )
        self._losses = self._make("seg_fit_loss", "Each term of the loss, and what is watched beside it.", "term")
        self._when = self._make("seg_fit_told_timestamp_seconds", "When these figures were written.")
        self._make("seg_fit_steps", "Steps of the whole fit.").labels(self._run).set(steps)
        self._told = -math.inf

    def tell(self, step: int, losses: Mapping[str, float], left_s: float, *, is_last: bool) -> None:
        """Write the file, if that is due."""
        now = time.monotonic()
        if now - self._told < EVERY_S and not is_last:
            return
        self._told = now
        self._step.labels(self._run).set(step)
        self._left_s.labels(self._run).set(left_s)
        for term, value in losses.items():
            self._losses.labels(self._run, term).set(value)
        self._write(is_broken=False)

    def fail(self) -> None:
        """Write that the fit broke; the figures stay those that were told last."""
        self._write(is_broken=True)

    def _write(self, *, is_broken: bool) -> None:
        self._is_broken.labels(self._run).set(is_broken)
        self._when.labels(self._run).set_to_current_time()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(self._path), self._registry)

    def _make(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(name, words, ("run", *labels), registry=self._registry)
