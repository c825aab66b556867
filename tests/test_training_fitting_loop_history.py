from pathlib import Path

from training.fitting.loop.history import append_losses, forget_after, read_losses


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
