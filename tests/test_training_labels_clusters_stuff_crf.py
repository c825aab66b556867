import numpy as np
import pytest

from model.contract import Canvas
from model.pixels import plan_placement
from training.labels.clusters.stuff import label_stuff
from training.labels.clusters.stuff_crf import settle


def test_borders_move_to_where_the_colour_changes() -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="the extra `crf` is not installed")
    image = np.full((56, 56, 3), 30, np.uint8)
    image[:, 24:] = 220  # four pixels before the patches change sides
    cosines = np.zeros((4, 4, 2), np.float32)
    cosines[:, :2, 0] = cosines[:, 2:, 1] = 1.0
    placement = plan_placement(56, 56, [Canvas.square(56)], 4)
    before = label_stuff(cosines, np.eye(2, dtype=np.float32), 14, placement)
    assert (before[:, 25] == 1).all()
    after = settle(image, cosines, 14, placement)
    assert (after[:, :24] == 1).all()
    assert (after[:, 24:] == 2).all()
