from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.fitting.loop.curves import average_window, draw_curves
from training.fitting.loop.history import append_losses

STRONG = (40, 90, 160)


def find(picture: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of that colour."""
    return np.argwhere((np.asarray(Image.open(picture).convert("RGB")) == colour).all(2))


def test_a_running_mean_begins_with_what_there_is() -> None:
    assert average_window(np.array([4.0, 2.0, 6.0, 0.0]), 2).tolist() == pytest.approx([4.0, 3.0, 4.0, 3.0])


def test_a_falling_loss_is_a_falling_line(tmp_path: Path) -> None:
    for step in range(1, 51):
        append_losses(tmp_path / "history.csv", step, {"total": 2.0 - step / 50})
    draw_curves(tmp_path / "history.csv", tmp_path / "curves.png", "run")
    drawn = find(tmp_path / "curves.png", STRONG)
    left, right = (drawn[drawn[:, 1] == column][:, 0].mean() for column in (drawn[:, 1].min(), drawn[:, 1].max()))
    assert right - left > 80  # rows count downwards; half of the plot's height


def test_terms_that_are_not_numbers_everywhere_and_empty_histories_are_drawn(tmp_path: Path) -> None:
    draw_curves(tmp_path / "none.csv", tmp_path / "empty.png", "nothing yet")
    assert len(find(tmp_path / "empty.png", STRONG)) == 0
    for step, losses in enumerate([{"a": 1.0, "total": 1.0}, {"total": 0.5}, {"a": 0.0, "total": 0.25}], start=1):
        append_losses(tmp_path / "history.csv", step, losses)
    draw_curves(tmp_path / "history.csv", tmp_path / "curves.png", "run")
    assert len(find(tmp_path / "curves.png", STRONG)) > 0
