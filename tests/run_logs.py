"""Reads the losses of a training run."""

import csv
from pathlib import Path


def read_csv_log(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV log, with `step` among them."""
    with path.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    return {name: [float(row[index] or "nan") for row in rows] for index, name in enumerate(header)}
