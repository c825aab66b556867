"""Loggers of a training run."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.trainer.loggers import (
    CsvLogger,
    PrometheusTextfileLogger,
    TensorBoardLogger,
    plot_losses,
    read_csv_log,
    running_mean,
)


def test_a_csv_log_is_read_as_columns_and_can_be_truncated(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path / "run" / "losses.csv")
    log.log(1, {"mask": 0.5, "total": 1.25})
    log.log(2, {"mask": 0.25, "total": 1.0})
    assert read_csv_log(log.path) == {"step": [1.0, 2.0], "mask": [0.5, 0.25], "total": [1.25, 1.0]}
    log.truncate_after(1)
    assert read_csv_log(log.path)["step"] == [1.0]
    assert read_csv_log(tmp_path / "missing.csv") == {}


def test_a_csv_log_keeps_its_columns_when_terms_appear_or_are_missing(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path / "losses.csv")
    log.log(1, {"mask": 0.5, "total": 1.25})
    log.log(2, {"new": 7.0, "mask": 0.25, "total": 1.0})
    log.log(3, {"new": 7.0, "total": 0.5})
    columns = read_csv_log(log.path)
    assert (columns["total"], columns["mask"][:2]) == ([1.25, 1.0, 0.5], [0.5, 0.25])
    assert math.isnan(columns["mask"][2])


def test_tensorboard_shows_each_step_once_after_a_resumed_run(tmp_path: Path) -> None:
    first, resumed = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"total": float(step)})
    first.close()
    for step in (3, 4):
        resumed.log(step, {"total": 10.0 * step})
    resumed.mark_failed()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/total")
    assert [(each.step, each.value) for each in events] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def read_textfile(path: Path) -> dict[str, float]:
    """The values of the file by metric, those of the losses by term, without the time; all have the same run."""
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"RUN"}
    values = {sample.labels.get("term", sample.name): sample.value for sample in samples}
    assert 0.0 <= time.time() - values.pop("useg_train_updated_timestamp_seconds") < 60.0
    return values


def test_the_textfile_has_progress_and_losses_and_is_written_at_intervals(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "useg.prom"
    log = PrometheusTextfileLogger(path, Path("RUN"), 300)
    log.log(30, {"total": 7.5, "mask": 2.5}, 540.0, is_last=False)
    assert read_textfile(path) == {
        "useg_train_step": 30.0,
        "useg_train_max_steps": 300.0,
        "useg_train_seconds_left": 540.0,
        "useg_train_not_finite": 0.0,
        "total": 7.5,
        "mask": 2.5,
    }
    log.log(31, {"total": 7.0, "mask": 2.0}, 538.0, is_last=False)
    assert read_textfile(path)["useg_train_step"] == 30.0  # too soon to be written again
    log.log(300, {"total": 1.0, "mask": 0.5}, 0.0, is_last=True)
    assert (read_textfile(path)["useg_train_step"], read_textfile(path)["total"]) == (300.0, 1.0)
    assert [each.name for each in path.parent.iterdir()] == ["useg.prom"]


def test_a_failed_run_keeps_its_last_values_in_the_textfile(tmp_path: Path) -> None:
    path = tmp_path / "useg.prom"
    log = PrometheusTextfileLogger(path, Path("RUN"), 300)
    log.log(30, {"total": 7.5}, math.inf, is_last=False)
    log.mark_failed()
    values = read_textfile(path)
    assert (values["useg_train_not_finite"], values["useg_train_step"], values["total"]) == (1.0, 30.0, 7.5)


def test_a_running_mean_starts_with_the_values_there_are() -> None:
    assert running_mean(np.array([4.0, 2.0, 6.0, 0.0]), 2).tolist() == pytest.approx([4.0, 3.0, 4.0, 3.0])


def find_line(plot: Path) -> np.ndarray:
    """Rows and columns of the pixels of the running mean (tab:blue)."""
    return np.argwhere((np.asarray(Image.open(plot).convert("RGB")) == (31, 119, 180)).all(2))


def test_a_falling_loss_is_a_falling_line(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path / "losses.csv")
    for step in range(1, 51):
        log.log(step, {"total": 2.0 - step / 50})
    plot_losses(log.path, tmp_path / "losses.png", "run")
    line = find_line(tmp_path / "losses.png")
    left, right = (line[line[:, 1] == column][:, 0].mean() for column in (line[:, 1].min(), line[:, 1].max()))
    assert right - left > 50  # image rows count downwards


def test_missing_values_and_empty_logs_are_plotted(tmp_path: Path) -> None:
    plot_losses(tmp_path / "missing.csv", tmp_path / "empty.png", "no steps yet")
    assert len(find_line(tmp_path / "empty.png")) == 0
    log = CsvLogger(tmp_path / "losses.csv")
    for step, losses in enumerate([{"a": 1.0, "total": 1.0}, {"total": 0.5}, {"a": 0.0, "total": 0.25}], start=1):
        log.log(step, losses)
    plot_losses(log.path, tmp_path / "losses.png", "run")
    assert len(find_line(tmp_path / "losses.png")) > 0
