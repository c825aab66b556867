"""Suppression by sweeps is greedy suppression once there are enough of them."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from model.network.boxes import compare
from model.network.suppression import suppress


def draw_chain(count: int) -> Tensor:
    """Boxes each of which overlaps the next by 7/13 and the one after by 4/16."""
    left = 3.0 * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 10.0, torch.ones(count)], dim=1)[None]


def draw_boxes(batch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * 60.0
    return torch.cat([corner, corner + 5.0 + torch.rand(batch, count, 2, generator=generator) * 40.0], dim=2)


def use_all(boxes: Tensor) -> Tensor:
    return torch.ones(boxes.shape[:2], dtype=torch.bool)


def suppress_greedily(overlaps: Tensor, threshold: float) -> list[bool]:
    keep: list[bool] = []
    for row in range(len(overlaps)):
        keep.append(not any(keep[other] and overlaps[other, row] > threshold for other in range(row)))
    return keep


def test_the_best_of_overlapping_boxes_stays_and_what_it_drops_drops_nothing() -> None:
    chain = draw_chain(5)
    assert suppress(chain, use_all(chain), 0.5, 5).tolist() == [[True, False, True, False, True]]


def test_boxes_that_overlap_by_the_threshold_exactly_stay() -> None:
    pair = torch.tensor([[[0.0, 0.0, 4.0, 1.0], [2.0, 0.0, 4.0, 1.0]]])
    assert suppress(pair, use_all(pair), 0.5, 4).tolist() == [[True, True]]
    assert suppress(pair, use_all(pair), 0.4999, 4).tolist() == [[True, False]]


def test_groups_do_not_meet() -> None:
    same = draw_chain(1).expand(1, 4, 4)
    groups = torch.tensor([[7, 3, 7, 3]])
    assert suppress(same, use_all(same), 0.5, 4, groups).tolist() == [[True, True, False, False]]


def test_an_unused_box_neither_stays_nor_drops_another() -> None:
    chain = draw_chain(3)
    assert suppress(chain, torch.tensor([[False, True, True]]), 0.5, 3).tolist() == [[False, True, False]]


def test_too_few_sweeps_keep_too_many_boxes_if_even_and_too_few_if_odd() -> None:
    chain = draw_chain(9)
    right = suppress(chain, use_all(chain), 0.5, 9)
    for sweeps in (2, 4, 6):
        kept = suppress(chain, use_all(chain), 0.5, sweeps)
        assert (kept & right).equal(right)
        assert kept.sum() > right.sum()
    for sweeps in (1, 3, 5):
        kept = suppress(chain, use_all(chain), 0.5, sweeps)
        assert (kept & right).equal(kept)
        assert kept.sum() < right.sum()


def test_a_box_takes_as_many_sweeps_as_its_chain_is_long() -> None:
    """Box i of the chain hangs on box i - 1, and is right from sweep i on."""
    chain = draw_chain(9)
    right = suppress(chain, use_all(chain), 0.5, 9)
    for sweeps in range(1, 9):
        is_right = suppress(chain, use_all(chain), 0.5, sweeps) == right
        assert is_right[0, : sweeps + 1].all()
        assert is_right.all() == (sweeps >= 8)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.65])
def test_random_boxes_are_suppressed_greedily_picture_by_picture(threshold: float) -> None:
    boxes = draw_boxes(4, 150, seed=3)
    kept = suppress(boxes, use_all(boxes), threshold, 30)
    for picture, overlaps in enumerate(compare(boxes)):
        assert kept[picture].tolist() == suppress_greedily(overlaps, threshold)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("key", "threshold", "is_grouped"),
    [("nms_keep_50", 0.5, True), ("nms_keep_65", 0.65, True), ("nms_agnostic_keep_50", 0.5, False)],
)
def test_what_stays_is_the_references_to_the_box(golden: Path, key: str, threshold: float, is_grouped: bool) -> None:
    units = reference.read_units(golden)
    order = np.argsort(-units["nms_scores"], kind="stable")
    boxes = torch.from_numpy(units["nms_boxes"][order])[None]
    groups = torch.from_numpy(units["nms_classes"][order])[None] if is_grouped else None
    kept = suppress(boxes, use_all(boxes), threshold, 16, groups)[0].numpy()
    np.testing.assert_array_equal(order[kept], units[key])
