"""The losses of a fit, a row a step."""

import csv
import math
import time
from collections.abc import Mapping, Sequence
from os import SEEK_END
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from model.files import atomic_write


def append_losses(path: Path, step: int, losses: dict[str, float]) -> None:
    """Add a row; the first one brings the heading, and a term that is new since then is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerow(["step", *losses])
    with path.open("r+", newline="") as stream:
        heading = next(csv.reader(stream))
        stream.seek(0, SEEK_END)
        row = {"step": step, **{name: f"{value:.5f}" for name, value in losses.items()}}
        csv.DictWriter(stream, heading, extrasaction="ignore").writerow(row)


def read_losses(path: Path) -> dict[str, list[float]]:
    """The columns, `step` among them; empty without a file."""
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        heading, *rows = csv.reader(stream)
    return {name: [float(row[place] or "nan") for row in rows] for place, name in enumerate(heading)}


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed fit will do again."""
    if not path.exists():
        return
    with path.open(newline="") as stream:
        heading, *rows = csv.reader(stream)
    with atomic_write(path) as sibling, sibling.open("w", newline="") as stream:
        csv.writer(stream).writerows([heading, *(row for row in rows if int(row[0]) <= step)])


EVERY_S = 5.0
"""Between two files: Prometheus seldom looks more often."""


class PrometheusTextfileLogger:
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


_WIDTH_PX, _HEIGHT_PX = 360, 200
"""Of the plot of one term."""
_COLUMNS = 3
_LEFT_PX, _ABOVE_PX, _BELOW_PX, _GAP_PX, _TITLE_PX = 64, 30, 26, 22, 40
_TEXT_PX, _HEADING_PX = 13, 18
_PAPER_RGB, _TEXT_RGB, _FAINT_RGB = (255, 255, 255), (40, 40, 40), (140, 140, 140)
_EACH_RGB, _MEAN_RGB, _LINE_RGB = (190, 205, 225), (40, 90, 160), (225, 225, 225)
_WINDOW_SHARE = 0.02
"""Of the steps; the mean is taken over so many, the last one among them."""
_WORST_SHARE = 0.98
"""The picture is as high as this share of the values: a few at the beginning would squash the rest."""


def plot_losses(history: Path, out: Path, title: str) -> None:
    """A PNG with a plot for each column of a history: single steps pale, their running mean strong."""
    columns = read_losses(history)
    steps = columns.pop("step", [])
    names = sorted(columns, key=lambda name: name != "total")
    rows = -(-len(names) // _COLUMNS)
    cell_width, cell_height = _LEFT_PX + _WIDTH_PX + _GAP_PX, _ABOVE_PX + _HEIGHT_PX + _BELOW_PX
    width, height = min(_COLUMNS, max(1, len(names))) * cell_width, _TITLE_PX + max(1, rows) * cell_height
    sheet = Image.new("RGB", (width, height), _PAPER_RGB)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP_PX, _GAP_PX // 2), title, fill=_TEXT_RGB, font=ImageFont.load_default(_HEADING_PX))
    for place, name in enumerate(names):
        row, column = divmod(place, _COLUMNS)
        corner = (column * cell_width + _LEFT_PX, _TITLE_PX + row * cell_height + _ABOVE_PX)
        _plot(pen, corner, name, np.array(steps), np.array(columns[name]))
    with atomic_write(out) as sibling, sibling.open("wb") as stream:
        sheet.save(stream, "PNG")


def average_window(values: Float[np.ndarray, "N"], length: int) -> Float[np.ndarray, "N"]:
    """The mean of each value and those before it, `length` in all or as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - length)
    means: Float[np.ndarray, "N"] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _plot(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    name: str,
    steps: Float[np.ndarray, "N"],
    values: Float[np.ndarray, "N"],
) -> None:
    font = ImageFont.load_default(_TEXT_PX)
    left, top = corner
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return
    means = average_window(values, max(1, round(_WINDOW_SHARE * len(values))))
    last, highest = max(1.0, steps[-1]), max(float(np.quantile(values, _WORST_SHARE)), 1e-9)
    pen.text((left, top - 22), f"{name}: {means[-1]:.4g}", fill=_TEXT_RGB, font=font)
    for share in (0.0, 0.5, 1.0):
        level = top + round((1.0 - share) * _HEIGHT_PX)
        pen.line([(left, level), (left + _WIDTH_PX, level)], fill=_LINE_RGB)
        pen.text((left - 8, level), f"{share * highest:.3g}", fill=_FAINT_RGB, font=font, anchor="rm")
        along = left + round(share * _WIDTH_PX)
        pen.text((along, top + _HEIGHT_PX + 5), f"{share * last:,.0f}", fill=_FAINT_RGB, font=font, anchor="ma")
    for series, colour, thickness in ((values, _EACH_RGB, 1), (means, _MEAN_RGB, 2)):
        across = left + steps / last * _WIDTH_PX
        down = top + (1.0 - np.clip(series / highest, 0.0, 1.0)) * _HEIGHT_PX
        points: Sequence[tuple[float, float]] = list(zip(across.tolist(), down.tolist(), strict=True))
        if len(points) > 1:
            pen.line(points, fill=colour, width=thickness)
