"""The figures of a load are those of its answers, and photos come in the sizes that were asked for."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture
def load(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("load", repository / "deploy" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


def test_a_good_answer_is_a_200_within_the_limit(load: ModuleType) -> None:
    answers = [
        load.Answer(seconds=0.1, status=200, stages_ms={"decode": 4.0, "infer": 10.0}),
        load.Answer(seconds=0.3, status=200, stages_ms={"decode": 8.0, "infer": 30.0}),
        load.Answer(seconds=3.0, status=200, stages_ms={"decode": 99.0}),
        load.Answer(seconds=0.0, status=503),
        load.Answer(seconds=0.0, status=429),
        load.Answer(seconds=1.0, status=0),
    ]
    summary = load.summarise(answers, 2.0, 1.0)
    assert (summary["sent_per_s"], summary["goodput_per_s"], summary["p50_ms"]) == (3.0, 1.0, 200.0)
    assert summary["rejected_share"] == 0.333
    assert summary["statuses"] == {0: 1, 200: 3, 429: 1, 503: 1}
    assert summary["stages_ms"] == {"decode": 6.0, "infer": 20.0}


def test_photos_are_scaled_to_the_sizes_in_turn(load: ModuleType, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    sizes = [Image.open(io.BytesIO(photo)).size for photo in load.read_photos(tmp_path, 4, (0.0006, 0.0024))]
    assert sizes == [(30, 20), (60, 40), (30, 20), (60, 40)]
