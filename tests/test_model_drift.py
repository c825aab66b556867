"""Output statistics, the population stability index, and the reference in an artifact."""

import math
from pathlib import Path

import numpy as np
import pytest

from model.backends.loader import load_session
from model.commands.artifacts import drift_reference
from model.contract import Histogram
from model.drift import build_histograms, population_stability_index
from model.errors import ConfigError
from model.postprocessing.panoptic import Segment, Segmentation, output_statistics


def make_segmentation(*scores: float, stuff: int = 0, void: float = 0.0) -> Segmentation:
    label_map = np.ones((10, 10), np.int32)
    label_map.flat[: round(100 * void)] = 0
    things = [Segment(id=number, cluster=1, is_thing=True, score=score) for number, score in enumerate(scores, start=1)]
    others = [Segment(id=50 + number, cluster=9, is_thing=False, score=0.1) for number in range(stuff)]
    return Segmentation(label_map=label_map, segments=(*things, *others))


def test_statistics_are_segments_void_fraction_and_mean_score_of_things() -> None:
    assert output_statistics(make_segmentation(stuff=3)) == {"segments": 3.0, "void": 0.0}
    measured = output_statistics(make_segmentation(0.5, 0.9, stuff=2, void=0.25))
    assert measured == {"segments": 4.0, "void": 0.25, "score": pytest.approx(0.7)}


def test_values_on_an_edge_are_counted_above_it() -> None:
    counted = build_histograms(
        [{"segments": 0.0}, {"segments": 1.0}, {"segments": 7.0, "score": 0.95}, {"segments": 99.0}]
    )
    assert counted["segments"].counts == (1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert counted["score"].counts == (0,) * 10 + (1,)
    assert counted["void"].counts == (0,) * 11


def test_the_index_is_zero_for_equal_distributions_and_as_computed_by_hand() -> None:
    reference = Histogram(edges=(0.5,), counts=(10, 10))
    assert population_stability_index(reference, Histogram(edges=(0.5,), counts=(300, 300))) == 0.0
    assert population_stability_index(reference, Histogram(edges=(0.5,), counts=(3, 1))) == pytest.approx(
        0.25 * math.log(1.5) - 0.25 * math.log(0.5)
    )
    assert math.isfinite(population_stability_index(reference, Histogram(edges=(0.5,), counts=(4, 0))))


@pytest.mark.parametrize("observed", [Histogram(edges=(0.6,), counts=(1, 1)), Histogram(edges=(0.5,), counts=(0, 0))])
def test_histograms_that_cannot_be_compared_are_rejected(observed: Histogram) -> None:
    with pytest.raises(ConfigError, match="same edges"):
        population_stability_index(Histogram(edges=(0.5,), counts=(1, 1)), observed)


def test_the_drift_reference_is_stored_deterministic_and_replaced(artifact: Path, tiny_photos: Path) -> None:
    first = drift_reference(artifact, photos=tiny_photos, max_photos=5, backend="cpu", threads=1)
    contract, _ = load_session(artifact, threads=1)
    assert sorted(contract.drift_reference) == ["score", "segments", "void"]
    assert sum(contract.drift_reference["segments"].counts) == sum(contract.drift_reference["void"].counts) == 5
    assert drift_reference(artifact, photos=tiny_photos, max_photos=5, backend="cpu", threads=1) == first
    whole = drift_reference(artifact, photos=tiny_photos, backend="cpu", threads=1)
    assert sum(whole["drift_reference"]["void"]) == 8


def test_a_folder_without_photos_leaves_the_artifact_unchanged(tmp_path: Path, artifact: Path) -> None:
    before = (artifact / "contract.json").read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "note.txt").write_text("no photo")
    with pytest.raises(ConfigError, match="has no readable photo"):
        drift_reference(artifact, photos=tmp_path / "photos", backend="cpu", threads=1)
    assert (artifact / "contract.json").read_bytes() == before
