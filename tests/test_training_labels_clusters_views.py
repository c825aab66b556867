from pathlib import Path

import numpy as np
import pytest

from model.errors import LabelStoreError
from training.labels.clusters.views import fit_views, read_views


def draw_tokens() -> np.ndarray:
    """Two axes, one ten times as long as the other, and a mean far off."""
    return np.random.default_rng(0).normal(0.0, [10.0, 1.0], (4000, 2)) + np.array([100.0, 50.0])


def test_views_take_out_the_mean_and_weigh_axes_less_and_less_by_their_length() -> None:
    sample = draw_tokens()
    centred, white, half = fit_views(sample).look(sample.mean(0) + np.array([[[10.0, 1.0]]]))
    assert np.abs(centred[0, 0]) == pytest.approx(np.array([10.0, 1.0]) / np.hypot(10, 1), abs=1e-6)
    # 4,000 draws fix a deviation to 1.1 %.
    assert np.abs(white[0, 0]) == pytest.approx(np.array([1.0, 1.0]) / np.hypot(1, 1), abs=0.03)
    root = np.sqrt(10.0)
    assert np.abs(half[0, 0]) == pytest.approx(np.array([root, 1.0]) / np.hypot(root, 1), abs=0.03)


def test_views_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    views = fit_views(draw_tokens())
    views.write(tmp_path / "views.npz")
    again = read_views(tmp_path / "views.npz")
    assert (again.mean == views.mean).all()
    assert (again.projection == views.projection).all()


def test_a_file_that_holds_no_views_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "views.npz", other=np.zeros(3))
    with pytest.raises(LabelStoreError, match=r"views\.npz holds no views"):
        read_views(tmp_path / "views.npz")
