import csv
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import ConfigError
from model.run import load_run
from training.fitting.fit import fit
from training.fitting.transformer.recipe import PRESETS
from training.labels.store import LabelStore

PIXELS = replace(
    PRESETS["tiny"],
    inputs="pixels",
    crop_rate=1.0,
    paste_rate=1.0,
    targets="instances",
    drops_unknown=True,
    embeds=True,
)


def read_history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_fit_on_pixels_needs_no_features_and_is_the_same_each_time(tmp_path: Path, tiny_store: LabelStore) -> None:
    for name in ("first", "second"):
        assert fit(tiny_store, tmp_path / "nowhere", tmp_path / name, PIXELS).step == 4
    first = read_history(tmp_path / "first")
    assert first == read_history(tmp_path / "second")
    assert float(first[0]["embedding"]) > 0.0
    load_run(tmp_path / "first")


def test_a_fit_on_pixels_in_few_bits_comes_close_to_one_in_full(tmp_path: Path, tiny_store: LabelStore) -> None:
    one_step = replace(PIXELS, steps=1)
    totals = []
    for precision in ("fp32", "bf16"):
        fit(tiny_store, tmp_path / "nowhere", tmp_path / precision, replace(one_step, precision=precision))
        totals.append(float(read_history(tmp_path / precision)[0]["total"]))
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # bf16 has eight bits; matches may differ


@pytest.mark.parametrize(
    ("field", "value"), [("inputs", "photos"), ("targets", "none"), ("jitter", 1.5), ("most_targets", 0)]
)
def test_recipes_with_unknown_words_or_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(PRESETS["tiny"], **{field: value})  # type: ignore[arg-type]
