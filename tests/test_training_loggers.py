import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from training.trainer.loggers import (
    PrometheusTextfileLogger,
    append_losses,
    average_window,
    forget_after,
    plot_losses,
    read_losses,
)


def test_rows_come_back_as_columns(tmp_path: Path) -> None:
    history = tmp_path / "run" / "history.csv"
    append_losses(history, 1, {"mask": 0.5, "total": 1.25})
    append_losses(history, 2, {"mask": 0.25, "total": 1.0})
    assert read_losses(history) == {"step": [1.0, 2.0], "mask": [0.5, 0.25], "total": [1.25, 1.0]}
    forget_after(history, 1)
    assert read_losses(history)["step"] == [1.0]
    assert read_losses(tmp_path / "none.csv") == {}


def test_a_term_that_came_later_does_not_shift_the_columns(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    append_losses(history, 1, {"mask": 0.5, "total": 1.25})
    append_losses(history, 2, {"new": 7.0, "mask": 0.25, "total": 1.0})
    append_losses(history, 3, {"new": 7.0, "total": 0.5})
    columns = read_losses(history)
    assert (columns["total"], columns["mask"][:2]) == ([1.25, 1.0, 0.5], [0.5, 0.25])
    assert columns["mask"][2] != columns["mask"][2]  # absent


def read(path: Path) -> dict[str, float]:
    """Each figure of the file by its name, those of a loss by their term, without the time; all are of the one run."""
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"RUN"}
    figures = {sample.labels.get("term", sample.name): sample.value for sample in samples}
    assert 0.0 <= time.time() - figures.pop("seg_fit_told_timestamp_seconds") < 60.0
    return figures


def test_a_file_tells_how_far_a_fit_is_and_its_losses(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "useg.prom"
    gauges = PrometheusTextfileLogger(path, Path("RUN"), 300)
    gauges.tell(30, {"total": 7.5, "mask": 2.5}, 540.0, is_last=False)
    first = {"seg_fit_step": 30.0, "seg_fit_steps": 300.0, "seg_fit_seconds_left": 540.0, "seg_fit_not_finite": 0.0}
    assert read(path) == {**first, "total": 7.5, "mask": 2.5}
    gauges.tell(31, {"total": 7.0, "mask": 2.0}, 538.0, is_last=False)
    assert read(path)["seg_fit_step"] == 30.0  # so soon it is not written again
    gauges.tell(300, {"total": 1.0, "mask": 0.5}, 0.0, is_last=True)
    assert (read(path)["seg_fit_step"], read(path)["total"]) == (300.0, 1.0)
    assert [each.name for each in path.parent.iterdir()] == ["useg.prom"]


def test_a_fit_that_broke_says_so_beside_its_last_figures(tmp_path: Path) -> None:
    path = tmp_path / "useg.prom"
    gauges = PrometheusTextfileLogger(path, Path("RUN"), 300)
    gauges.tell(30, {"total": 7.5}, math.inf, is_last=False)
    gauges.fail()
    assert read(path) == {
        "seg_fit_step": 30.0,
        "seg_fit_steps": 300.0,
        "seg_fit_seconds_left": math.inf,
        "seg_fit_not_finite": 1.0,
        "total": 7.5,
    }


STRONG = (40, 90, 160)


def find(picture: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of that colour."""
    return np.argwhere((np.asarray(Image.open(picture).convert("RGB")) == colour).all(2))


def test_a_running_mean_begins_with_what_there_is() -> None:
    assert average_window(np.array([4.0, 2.0, 6.0, 0.0]), 2).tolist() == pytest.approx([4.0, 3.0, 4.0, 3.0])


def test_a_falling_loss_is_a_falling_line(tmp_path: Path) -> None:
    for step in range(1, 51):
        append_losses(tmp_path / "history.csv", step, {"total": 2.0 - step / 50})
    plot_losses(tmp_path / "history.csv", tmp_path / "curves.png", "run")
    drawn = find(tmp_path / "curves.png", STRONG)
    left, right = (drawn[drawn[:, 1] == column][:, 0].mean() for column in (drawn[:, 1].min(), drawn[:, 1].max()))
    assert right - left > 80  # rows count downwards; half of the plot's height


def test_terms_that_are_not_numbers_everywhere_and_empty_histories_are_drawn(tmp_path: Path) -> None:
    plot_losses(tmp_path / "none.csv", tmp_path / "empty.png", "nothing yet")
    assert len(find(tmp_path / "empty.png", STRONG)) == 0
    for step, losses in enumerate([{"a": 1.0, "total": 1.0}, {"total": 0.5}, {"a": 0.0, "total": 0.25}], start=1):
        append_losses(tmp_path / "history.csv", step, losses)
    plot_losses(tmp_path / "history.csv", tmp_path / "curves.png", "run")
    assert len(find(tmp_path / "curves.png", STRONG)) > 0
