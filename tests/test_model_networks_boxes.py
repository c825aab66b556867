"""Boxes drawn by hand move, meet and are cut as arithmetic says, and as detectron2's."""

import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from model.networks.boxes import DeltaWeights, apply_deltas, box_area, box_iou, clip_boxes, get_deltas, is_nonempty, nms

ONES = (1.0, 1.0, 1.0, 1.0)
BOX = torch.tensor([10.0, 20.0, 30.0, 60.0])


def test_deltas_are_shifts_in_sides_and_growths_in_logarithms() -> None:
    # Centre (20, 40), sides 20 and 40: to the right by half its width, down by a quarter of its height, twice as wide.
    target = torch.tensor([10.0, 30.0, 50.0, 70.0])
    expected = torch.tensor([0.5, 0.25, math.log(2.0), 0.0])
    torch.testing.assert_close(get_deltas(BOX, target, ONES), expected)
    torch.testing.assert_close(apply_deltas(BOX, expected, ONES), target)


def test_weights_scale_the_deltas() -> None:
    weights = (10.0, 20.0, 5.0, 4.0)
    target = torch.tensor([10.0, 30.0, 50.0, 70.0])
    expected = torch.tensor([5.0, 5.0, 5.0 * math.log(2.0), 0.0])
    torch.testing.assert_close(get_deltas(BOX, target, weights), expected)
    torch.testing.assert_close(apply_deltas(BOX, expected, weights), target)


def test_a_wild_growth_stops_at_1000_over_16() -> None:
    grown = apply_deltas(BOX, torch.tensor([0.0, 0.0, 1e6, 0.0]), ONES)
    assert (grown[2] - grown[0]).item() == pytest.approx(20.0 * 62.5, rel=1e-5)  # float32


def test_boxes_are_cut_to_their_own_picture() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 50.0, 50.0]]).expand(2, 1, 4)
    cut = clip_boxes(boxes, torch.tensor([[20, 30], [60, 40]]))
    assert cut.tolist() == [[[0.0, 0.0, 30.0, 20.0]], [[0.0, 0.0, 40.0, 50.0]]]


def test_a_box_without_a_side_has_no_area() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0], [1.0, 5.0, 2.0, 5.0], [math.nan] * 4])
    assert is_nonempty(boxes).tolist() == [True, False, False, False]
    assert box_area(boxes[0]).item() == 6.0


def test_overlaps_of_pairs_counted_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0], [9.0, 9.0, 9.0, 9.0]]])
    # Half of each is shared: 8 / 24. An empty box overlaps nothing, not even itself.
    expected = torch.tensor([[[1.0, 1 / 3, 0.0], [1 / 3, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(box_iou(boxes), expected)


@pytest.mark.golden
@pytest.mark.parametrize("stage", range(4))
def test_the_codec_is_the_references(golden: Path, stage: int) -> None:
    units = {key: torch.from_numpy(array) for key, array in reference.read_units(golden).items()}
    along_x, along_y, of_width, of_height = units[f"b2b_w{stage}_weights"].tolist()
    weights: DeltaWeights = (along_x, along_y, of_width, of_height)
    encoded = get_deltas(units["b2b_src"], units["b2b_tgt"], weights)
    # float32 of boxes up to 3,700 px
    torch.testing.assert_close(encoded, units[f"b2b_w{stage}_encode"], rtol=1e-6, atol=1e-6)
    for deltas, key in ((units["b2b_deltas_in"], "decode"), (encoded, "roundtrip")):
        decoded = apply_deltas(units["b2b_src"], deltas, weights)
        torch.testing.assert_close(decoded, units[f"b2b_w{stage}_{key}"], rtol=1e-6, atol=1e-4)


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
    assert nms(chain, use_all(chain), 0.5, 5).tolist() == [[True, False, True, False, True]]


def test_boxes_that_overlap_by_the_threshold_exactly_stay() -> None:
    pair = torch.tensor([[[0.0, 0.0, 4.0, 1.0], [2.0, 0.0, 4.0, 1.0]]])
    assert nms(pair, use_all(pair), 0.5, 4).tolist() == [[True, True]]
    assert nms(pair, use_all(pair), 0.4999, 4).tolist() == [[True, False]]


def test_groups_do_not_meet() -> None:
    same = draw_chain(1).expand(1, 4, 4)
    groups = torch.tensor([[7, 3, 7, 3]])
    assert nms(same, use_all(same), 0.5, 4, groups).tolist() == [[True, True, False, False]]


def test_an_unused_box_neither_stays_nor_drops_another() -> None:
    chain = draw_chain(3)
    assert nms(chain, torch.tensor([[False, True, True]]), 0.5, 3).tolist() == [[False, True, False]]


def test_too_few_sweeps_keep_too_many_boxes_if_even_and_too_few_if_odd() -> None:
    chain = draw_chain(9)
    right = nms(chain, use_all(chain), 0.5, 9)
    for sweeps in (2, 4, 6):
        kept = nms(chain, use_all(chain), 0.5, sweeps)
        assert (kept & right).equal(right)
        assert kept.sum() > right.sum()
    for sweeps in (1, 3, 5):
        kept = nms(chain, use_all(chain), 0.5, sweeps)
        assert (kept & right).equal(kept)
        assert kept.sum() < right.sum()


def test_a_box_takes_as_many_sweeps_as_its_chain_is_long() -> None:
    """Box i of the chain hangs on box i - 1, and is right from sweep i on."""
    chain = draw_chain(9)
    right = nms(chain, use_all(chain), 0.5, 9)
    for sweeps in range(1, 9):
        is_right = nms(chain, use_all(chain), 0.5, sweeps) == right
        assert is_right[0, : sweeps + 1].all()
        assert is_right.all() == (sweeps >= 8)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.65])
def test_random_boxes_are_suppressed_greedily_picture_by_picture(threshold: float) -> None:
    boxes = draw_boxes(4, 150, seed=3)
    kept = nms(boxes, use_all(boxes), threshold, 30)
    for picture, overlaps in enumerate(box_iou(boxes)):
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
    kept = nms(boxes, use_all(boxes), threshold, 16, groups)[0].numpy()
    np.testing.assert_array_equal(order[kept], units[key])
