"""How alike panoptic answers are, counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from model.contract import Canvas, Contract, Thresholds
from model.errors import ParityError
from model.raw import Raw
from model.release.fidelity import Fidelity, FidelityLimits, measure_fidelity
from model.release.gate import Picture

CONTRACT = Contract(
    name="a", version="1", network="n", canvases=(Canvas.square(8),), stride_px=1, detections=1, thing_clusters=3,
    stuff_clusters=1, thresholds=Thresholds(score=0.3, stuff_area=0.0),
)  # fmt: skip
PICTURE = Picture(pixels=np.zeros((3, 8, 8), np.uint8), size=(8, 8))


class FixedSession:
    """Gives its answers in turn, one a picture."""

    backend = "fixed"

    def __init__(self, *answers: Raw) -> None:
        self._answers = iter(answers)

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[Raw]:
        return [next(self._answers) for _ in pixels]


def draw(rows: int, cluster: int = 0, score: float = 0.9) -> Raw:
    """A thing over the top rows, stuff below it and nowhere else."""
    masks = np.zeros((1, 8, 8), np.float32)
    masks[0, :rows] = 1.0
    semantic = np.zeros((2, 8, 8), np.float32)
    semantic[0, :rows], semantic[1, rows:] = 9.0, 9.0
    return Raw(
        scores=np.array([score], np.float32),
        clusters=np.array([cluster]),
        boxes=np.zeros((1, 4), np.float32),
        masks=masks,
        semantic=semantic,
    )


def measure(reference: Raw, given: Raw) -> Fidelity:
    return measure_fidelity(FixedSession(reference), FixedSession(given), [PICTURE], CONTRACT)


def test_the_same_answer_is_wholly_true() -> None:
    assert measure(draw(4), draw(4)) == Fidelity(photos=1, clusters_equal=1.0, panoptic_quality=1.0)


def test_a_moved_border_costs_its_pixels_and_its_share_of_both_segments() -> None:
    # The thing: 24 of 32 pixels. The stuff: 32 of 40.
    fidelity = measure(draw(4), draw(3))
    assert fidelity.clusters_equal == 56 / 64
    assert fidelity.panoptic_quality == pytest.approx((24 / 32 + 32 / 40) / 2)


def test_the_same_region_under_another_cluster_is_no_match() -> None:
    fidelity = measure(draw(4), draw(4, cluster=2))
    assert (fidelity.clusters_equal, fidelity.panoptic_quality) == (0.5, 0.5)  # the stuff alone


def test_a_lost_segment_leaves_void_that_is_not_equal() -> None:
    # The reference has two segments, the answer the stuff: 2 x 1 match of 3.
    fidelity = measure(draw(4), draw(4, score=0.1))
    assert fidelity.clusters_equal == 0.5
    assert fidelity.panoptic_quality == pytest.approx(2 / 3)


def test_segments_of_all_photos_are_counted_together() -> None:
    reference, given = FixedSession(draw(4), draw(4)), FixedSession(draw(4), draw(4, cluster=2))
    fidelity = measure_fidelity(reference, given, [PICTURE, PICTURE], CONTRACT)
    assert fidelity == Fidelity(photos=2, clusters_equal=0.75, panoptic_quality=0.75)


def test_photos_without_any_segment_judge_nothing() -> None:
    empty = draw(8, score=0.1)
    fidelity = measure(empty, empty)
    assert (fidelity.clusters_equal, fidelity.panoptic_quality) == (1.0, 0.0)
    with pytest.raises(ParityError, match="panoptic_quality below"):
        fidelity.require(FidelityLimits())


@pytest.mark.parametrize("name", ["clusters_equal", "panoptic_quality"])
@pytest.mark.parametrize("value", [0.79, np.nan])
def test_a_figure_below_its_limit_is_refused_by_name(name: str, value: float) -> None:
    sure = Fidelity(photos=20, clusters_equal=0.8, panoptic_quality=0.85)
    sure.require(FidelityLimits())
    with pytest.raises(ParityError, match=rf"{name} below .*photos 20.*{name} {value:.4g}"):
        replace(sure, **{name: value}).require(FidelityLimits())
