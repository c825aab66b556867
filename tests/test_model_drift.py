import math

import numpy as np
import pytest

from model.contract import Histogram
from model.drift import BIN_EDGES, build_histograms, output_statistics, population_stability_index
from model.errors import ConfigError
from model.postprocessing.panoptic import Segment, Segmentation


def answer(*scores: float, stuff: int = 0, void: float = 0.0) -> Segmentation:
    label_map = np.ones((10, 10), np.int32)
    label_map.flat[: round(100 * void)] = 0
    things = [Segment(id=number, cluster=1, is_thing=True, score=score) for number, score in enumerate(scores, start=1)]
    others = [Segment(id=50 + number, cluster=9, is_thing=False, score=0.1) for number in range(stuff)]
    return Segmentation(label_map=label_map, segments=(*things, *others))


def test_an_answer_is_measured_by_its_segments_its_void_and_the_score_of_its_things() -> None:
    measured = output_statistics(answer(0.5, 0.9, stuff=2, void=0.25))
    assert measured == {"segments": 4.0, "void": 0.25, "score": pytest.approx(0.7)}


def test_stuff_alone_has_no_score() -> None:
    assert output_statistics(answer(stuff=3)) == {"segments": 3.0, "void": 0.0}


def test_values_are_counted_between_the_edges_and_one_on_an_edge_above_it() -> None:
    counted = build_histograms(
        [{"segments": 0.0}, {"segments": 1.0}, {"segments": 7.0, "score": 0.95}, {"segments": 99.0}]
    )
    assert counted["segments"].counts == (1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert counted["score"].counts == (0,) * 10 + (1,)
    assert counted["void"].counts == (0,) * 11


def test_the_index_is_zero_for_the_same_shares_and_known_by_hand_for_others() -> None:
    reference = Histogram(edges=(0.5,), counts=(10, 10))
    assert population_stability_index(reference, Histogram(edges=(0.5,), counts=(300, 300))) == 0.0
    assert population_stability_index(reference, Histogram(edges=(0.5,), counts=(3, 1))) == pytest.approx(
        0.25 * math.log(1.5) - 0.25 * math.log(0.5)
    )
    assert math.isfinite(population_stability_index(reference, Histogram(edges=(0.5,), counts=(4, 0))))


@pytest.mark.parametrize("seen", [Histogram(edges=(0.6,), counts=(1, 1)), Histogram(edges=(0.5,), counts=(0, 0))])
def test_histograms_that_cannot_be_compared_are_rejected(seen: Histogram) -> None:
    with pytest.raises(ConfigError, match="same edges"):
        population_stability_index(Histogram(edges=(0.5,), counts=(1, 1)), seen)


def test_all_edges_rise() -> None:
    assert all(list(edges) == sorted(set(edges)) for edges in BIN_EDGES.values())
