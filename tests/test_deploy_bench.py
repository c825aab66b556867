"""The load generator's summaries, and the sizes of the photos that it sends."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture
def bench(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", repository / "deploy" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


def test_a_200_within_the_maximum_latency_is_successful(bench: ModuleType) -> None:
    responses = [
        bench.Response(seconds=0.1, status=200, stages_ms={"decode": 4.0, "infer": 10.0}),
        bench.Response(seconds=0.3, status=200, stages_ms={"decode": 8.0, "infer": 30.0}),
        bench.Response(seconds=3.0, status=200, stages_ms={"decode": 99.0}),
        bench.Response(seconds=0.0, status=503),
        bench.Response(seconds=0.0, status=429),
        bench.Response(seconds=1.0, status=0),
    ]
    summary = bench.summarize(responses, 2.0, max_latency_s=1.0)
    assert (summary["sent_per_s"], summary["goodput_per_s"], summary["p50_ms"]) == (3.0, 1.0, 200.0)
    assert summary["rejected_fraction"] == 0.333
    assert summary["statuses"] == {0: 1, 200: 3, 429: 1, 503: 1}
    assert summary["stages_ms"] == {"decode": 6.0, "infer": 20.0}


def test_photos_are_scaled_to_the_sizes_in_turn(bench: ModuleType, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    sizes = [Image.open(io.BytesIO(photo)).size for photo in bench.read_photos(tmp_path, 4, (0.0006, 0.0024))]
    assert sizes == [(30, 20), (60, 40), (30, 20), (60, 40)]
