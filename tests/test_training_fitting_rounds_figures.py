import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.errors import ConfigError
from training.fitting.rounds.figures import draw_rounds


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def score(pq: float, ap: float) -> dict[str, Any]:
    headline = {"ap": {"value": ap, "low": 0.0, "high": 9.0}}
    instance = {"agnostic_mask": {"headline": headline, "others": {}}}
    return {"panoptic": {"pq": {"value": pq, "low": 0.0, "high": 9.0}}, "semantic": {}, "instance": instance}


def test_scores_of_each_round_are_a_table_and_a_picture(tmp_path: Path) -> None:
    results = [write(tmp_path / f"{number}.json", score(4.0 + number, 2.0)) for number in range(3)]
    for _ in range(2):  # drawn again, it is not longer
        figures = draw_rounds(results, tmp_path)
    assert figures == [{"PQ": 4.0, "AP": 2.0}, {"PQ": 5.0, "AP": 2.0}, {"PQ": 6.0, "AP": 2.0}]
    assert (tmp_path / "rounds.csv").read_text().split() == [
        "step,PQ,AP",
        *(f"{n},{4 + n}.00000,2.00000" for n in range(3)),
    ]
    with Image.open(tmp_path / "rounds.png") as picture:
        assert picture.format == "PNG"


def test_without_truth_it_is_the_steadiness_that_is_drawn(tmp_path: Path) -> None:
    result = {"round": 1, "steadiness": {"flip": 0.9, "scale": 0.8, "covered": 0.7}, "before": None}
    assert draw_rounds([write(tmp_path / "a.json", result)], tmp_path) == [{"flip": 0.9, "scale": 0.8, "covered": 0.7}]


def test_results_of_two_kinds_or_of_none_are_refused(tmp_path: Path) -> None:
    steady = write(tmp_path / "a.json", {"steadiness": {"flip": 0.9, "scale": 0.8, "covered": 0.7}})
    with pytest.raises(ConfigError, match="results of one kind"):
        draw_rounds([steady, write(tmp_path / "b.json", score(1.0, 1.0))], tmp_path)
    with pytest.raises(ConfigError, match=r"c\.json is no result"):
        draw_rounds([write(tmp_path / "c.json", {})], tmp_path)
