import numpy as np
import pytest

from training.evaluation.metrics.bootstrap import bootstrap


def test_a_bootstrap_of_equal_pictures_has_no_width() -> None:
    values = np.full(20, 0.25)
    interval = bootstrap(20, lambda weights: {"mean": weights @ values / weights.sum(1)})["mean"]
    assert (interval.value, interval.low, interval.high) == (25.0, 25.0, 25.0)


def test_a_bootstrap_is_repeatable_and_as_wide_as_theory_has_it() -> None:
    spread = np.linspace(0, 1, 100)
    first, second = (
        bootstrap(100, lambda weights: {"mean": weights @ spread / weights.sum(1)})["mean"] for _ in range(2)
    )
    assert first == second
    assert first.value == 50.0
    # The mean of 100 values of standard deviation 0.2916 has one of 2.916 points; 95 % lie within 1.96 of them.
    # With 1,000 draws the ends of the interval are sure to about a tenth of that.
    assert first.high - first.low == pytest.approx(2 * 1.96 * 2.916, rel=0.1)


def test_every_draw_takes_as_many_pictures_as_there_are() -> None:
    seen = []

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(weights)
        return {"count": weights.sum(1) / 7}

    assert bootstrap(7, measure, draws=30)["count"].low == 100.0
    assert [each.shape for each in seen] == [(1, 7), (30, 7)]
    assert (seen[0] == 1).all()
    assert len({tuple(row) for row in seen[1]}) > 20
