"""The losses of a fit, a row a step."""

import csv
from os import SEEK_END
from pathlib import Path

from model.files import replace_file


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
    with replace_file(path) as sibling, sibling.open("w", newline="") as stream:
        csv.writer(stream).writerows([heading, *(row for row in rows if int(row[0]) <= step)])
