"""The losses of a fit, a row a step."""

import csv
from pathlib import Path

from model.files import replace_file


def append_losses(path: Path, step: int, losses: dict[str, float]) -> None:
    """Add a row; the first one brings the heading."""
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(["step", *losses])
        writer.writerow([step, *(f"{value:.5f}" for value in losses.values())])


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed fit will do again."""
    if not path.exists():
        return
    with path.open(newline="") as stream:
        heading, *rows = csv.reader(stream)
    with replace_file(path) as sibling, sibling.open("w", newline="") as stream:
        csv.writer(stream).writerows([heading, *(row for row in rows if int(row[0]) <= step)])
