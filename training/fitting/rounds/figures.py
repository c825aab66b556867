"""How good each round of self-training was, as a table and a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from training.fitting.loop.curves import draw_curves
from training.fitting.loop.history import append_losses

ROUNDS_FILE = "rounds.csv"
PICTURE_FILE = "rounds.png"
_STEADINESS = ("flip", "scale", "covered")


def draw_rounds(results: Sequence[Path], out: Path) -> list[dict[str, float]]:
    """The figures of each round, from 0 on, which are also written to `out` and drawn there.

    `results` are what `useg-train eval` or `useg-train relabel` said of each round's run, in their order. Raises
    ConfigError for a file that is neither, or if they are of both kinds.
    """
    figures = [_read_figures(path) for path in results]
    if len({tuple(each) for each in figures}) != 1:
        raise ConfigError("results of one kind are drawn together: of `eval` on one set, or of `relabel`")
    table = out / ROUNDS_FILE
    table.unlink(missing_ok=True)
    for number, each in enumerate(figures):
        append_losses(table, number, each)
    draw_curves(table, out / PICTURE_FILE, "the score of each round of self-training")
    return figures


def _read_figures(path: Path) -> dict[str, float]:
    """PQ, mIoU and AP as far as they are there, in percent; or the steadiness, as shares."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if "steadiness" in content:
            return {name: float(content["steadiness"][name]) for name in _STEADINESS}
        figures = {"PQ": content["panoptic"].get("pq"), "mIoU": content["semantic"].get("miou")}
        figures |= {"AP": content["instance"].get("agnostic_mask", {"headline": {}})["headline"].get("ap")}
        return {name: float(each["value"]) for name, each in figures.items() if each}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no result of `useg-train eval` or `relabel`: {error!r}") from error
