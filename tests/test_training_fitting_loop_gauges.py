import math
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from training.fitting.loop.gauges import FitGauges


def read(path: Path) -> dict[str, float]:
    """Each figure of the file by its name, those of a loss by their term, without the time; all are of the one run."""
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"RUN"}
    figures = {sample.labels.get("term", sample.name): sample.value for sample in samples}
    assert 0.0 <= time.time() - figures.pop("seg_fit_told_timestamp_seconds") < 60.0
    return figures


def test_a_file_tells_how_far_a_fit_is_and_its_losses(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "useg.prom"
    gauges = FitGauges(path, Path("RUN"), 300)
    gauges.tell(30, {"total": 7.5, "mask": 2.5}, 540.0, is_last=False)
    first = {"seg_fit_step": 30.0, "seg_fit_steps": 300.0, "seg_fit_seconds_left": 540.0, "seg_fit_not_finite": 0.0}
    assert read(path) == {**first, "total": 7.5, "mask": 2.5}
    gauges.tell(31, {"total": 7.0, "mask": 2.0}, 538.0, is_last=False)
    assert read(path)["seg_fit_step"] == 30.0  # so soon it is not written again
    gauges.tell(300, {"total": 1.0, "mask": 0.5}, 0.0, is_last=True)
    assert (read(path)["seg_fit_step"], read(path)["total"]) == (300.0, 1.0)
    assert [each.name for each in path.parent.iterdir()] == ["useg.prom"]


def test_a_fit_that_broke_says_so_beside_its_last_figures(tmp_path: Path) -> None:
    path = tmp_path / "useg.prom"
    gauges = FitGauges(path, Path("RUN"), 300)
    gauges.tell(30, {"total": 7.5}, math.inf, is_last=False)
    gauges.fail()
    assert read(path) == {
        "seg_fit_step": 30.0,
        "seg_fit_steps": 300.0,
        "seg_fit_seconds_left": math.inf,
        "seg_fit_not_finite": 1.0,
        "total": 7.5,
    }
