"""Features of boxes are averages that a ramp shows, and detectron2's."""

from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from model.errors import ConfigError
from model.network.roi import Sampling, assign_levels, place_samples, place_taps, pool

STRIDES_PX = (4, 8, 16, 32)
LONG = Sampling(reach=84)
"""Reaches the longest box of the reference's units, 76 cells."""
NOISE = 1e-5
"""float32 of features up to 3, at most 64 of them in a bin."""


def draw_ramp(height: int = 16, width: int = 24) -> Tensor:
    """Channel 0 holds the column, channel 1 the row."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([columns, rows])[None]


def pool_one(maps: Tensor, box: list[float], side: int = 2, sampling: Sampling = LONG) -> Tensor:
    """A box's features on a map at stride 4."""
    return pool([maps], [4], torch.tensor([[box]]), side, sampling)[0, 0]


def test_bins_of_a_ramp_hold_the_places_of_their_centres() -> None:
    # In cells: 1.5 to 5.5 across, 3.5 to 11.5 down.
    columns, rows = pool_one(draw_ramp(), [8.0, 16.0, 24.0, 48.0])
    torch.testing.assert_close(columns, torch.tensor([[2.5, 4.5], [2.5, 4.5]]))
    torch.testing.assert_close(rows, torch.tensor([[5.5, 5.5], [9.5, 9.5]]))


def test_bins_are_sampled_once_a_cell_if_adaptive() -> None:
    start, end, extent = torch.tensor([[0.5]]), torch.tensor([[4.5]]), torch.tensor([[9.0]])
    positions, weights = place_samples(start, end, extent, 2, Sampling(reach=6))
    assert positions[..., :2].tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]
    assert weights.tolist() == [[[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]]]


def test_a_box_beyond_the_reach_is_sampled_more_coarsely() -> None:
    start, end, extent = torch.tensor([[0.5]]), torch.tensor([[4.5]]), torch.tensor([[9.0]])
    positions, weights = place_samples(start, end, extent, 2, Sampling(reach=2))
    assert positions.tolist() == [[[[1.5], [3.5]]]]
    assert weights.tolist() == [[[[1.0], [1.0]]]]


def test_samples_a_cell_apart_share_the_cells_between_them() -> None:
    start, end, extent = torch.tensor([[0.75]]), torch.tensor([[2.75]]), torch.tensor([[9.0]])
    cells, weights = place_taps(start, end, extent, 1, Sampling(reach=2))  # samples at 1.25 and 2.25
    assert cells.tolist() == [[[[1, 2, 3]]]]
    assert weights.tolist() == [[[[0.375, 0.5, 0.125]]]]


def test_bins_beyond_the_reach_are_read_all_along() -> None:
    long = pool_one(draw_ramp(4, 96), [4.0, 4.0, 364.0, 12.0], sampling=Sampling(reach=14))
    # In cells 0.5 to 90.5, a bin of 45 with 7 samples: their mean is right to a cell's rounding.
    torch.testing.assert_close(long[0, 0], torch.tensor([23.0, 68.0]), rtol=0.0, atol=0.5)


def test_a_fixed_number_of_samples_averages_a_ramp_too() -> None:
    columns, rows = pool_one(draw_ramp(), [8.0, 16.0, 24.0, 48.0], sampling=Sampling(reach=4, is_adaptive=False))
    torch.testing.assert_close(columns, torch.tensor([[2.5, 4.5], [2.5, 4.5]]))
    torch.testing.assert_close(rows, torch.tensor([[5.5, 5.5], [9.5, 9.5]]))


def test_a_fixed_number_of_samples_serves_any_length() -> None:
    start, end, extent = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 5.0]]), torch.tensor([[9.0, 9.0]])
    positions, weights = place_samples(start, end, extent, 1, Sampling(reach=2, is_adaptive=False))
    assert positions.tolist() == [[[[1.25, 1.75]], [[2.0, 4.0]]]]
    assert weights.tolist() == [[[[0.5, 0.5]], [[0.5, 0.5]]]]


def test_samples_a_cell_or_more_outside_count_as_zero_and_nearer_ones_as_the_border() -> None:
    ones = torch.ones(1, 1, 16, 24)
    # In cells -2.5 to 1.5 across: samples at -2, -1, 0 and 1, of which the first is zero.
    assert pool_one(ones, [-8.0, 16.0, 8.0, 32.0])[0].tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert pool_one(ones, [200.0, 16.0, 216.0, 32.0]).abs().max() == 0.0


@pytest.mark.parametrize("box", [[8.0, 8.0, 8.0, 24.0], [8.0, 8.0, 24.0, 8.0], [8.0, 8.0, 8.0, 8.0]])
def test_a_box_without_a_side_holds_zeros(box: list[float]) -> None:
    assert pool_one(torch.ones(1, 1, 16, 24), box).abs().max() == 0.0


def test_boxes_are_read_from_the_level_that_suits_their_size() -> None:
    levels = [torch.full((1, 1, 256 // stride, 256 // stride), float(stride)) for stride in STRIDES_PX]
    boxes = torch.tensor([[[0.0, 0.0, side, side] for side in (20.0, 111.0, 112.0, 223.0, 224.0, 256.0)]])
    pooled = pool(levels, STRIDES_PX, boxes, 2, LONG)
    assert assign_levels(boxes, STRIDES_PX).tolist() == [[0, 0, 1, 1, 2, 2]]
    torch.testing.assert_close(pooled[0, :, 0, 0, 0], torch.tensor([4.0, 4.0, 8.0, 8.0, 16.0, 16.0]))


def test_the_border_of_a_level_does_not_see_the_level_beside_it() -> None:
    levels = [torch.full((1, 1, 64 // stride, 64 // stride), float(stride)) for stride in STRIDES_PX]
    boxes = torch.tensor([[[40.0, 40.0, 64.0, 64.0], [0.0, 0.0, 24.0, 24.0]]])
    torch.testing.assert_close(pool(levels, STRIDES_PX, boxes, 7, LONG), torch.full((1, 2, 1, 7, 7), 4.0))


def test_a_box_that_is_not_finite_harms_no_other() -> None:
    fine = [8.0, 16.0, 24.0, 48.0]
    boxes = torch.tensor([[[float("nan")] * 4, fine, [0.0, 0.0, float("inf"), 9.0], [-1e30, 0.0, 1e30, 9.0]]])
    pooled = pool([draw_ramp()], [4], boxes, 2, LONG)
    assert pooled[0, 1].equal(pool_one(draw_ramp(), fine))


def test_each_picture_has_its_own_features() -> None:
    maps = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]]).expand(2, 1, 4)
    assert pool([maps], [4], boxes, 2, LONG).mean((1, 2, 3, 4)).tolist() == [0.0, 1.0]


def test_gradients_reach_the_cells_of_the_box_and_no_others() -> None:
    maps = torch.zeros(1, 1, 16, 24, requires_grad=True)
    pool_one(maps, [8.0, 16.0, 24.0, 32.0]).sum().backward()
    assert maps.grad is not None
    assert maps.grad.sum().item() == pytest.approx(4.0, abs=1e-4)  # four averages, float32
    assert maps.grad[0, 0, 9:].abs().max() == 0.0
    assert maps.grad[0, 0, :, 7:].abs().max() == 0.0


def test_half_precision_maps_are_sampled_where_single_precision_ones_are() -> None:
    ramp = draw_ramp(64, 64)
    box = [101.0, 33.0, 130.0, 47.0]
    pooled = pool_one(ramp.bfloat16(), box)
    assert pooled.dtype == torch.bfloat16
    # Whole numbers below 256 are exact in bfloat16; the answer is rounded to eight bits.
    torch.testing.assert_close(pooled.float(), pool_one(ramp, box), rtol=2**-8, atol=0.0)


def test_a_reach_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError):
        Sampling(reach=0)


@pytest.mark.golden
@pytest.mark.parametrize("side", [7, 14])
def test_pooling_is_the_references(golden: Path, side: int) -> None:
    units = reference.read_units(golden)
    features, rois = torch.from_numpy(units["roialign_features"]), torch.from_numpy(units["roialign_rois"])
    expected = torch.from_numpy(units[f"roialign_out{side}"])
    for picture in (0, 1):
        is_here = rois[:, 0] == picture
        pooled = pool([features[[picture]]], [4], rois[is_here, 1:][None], side, LONG)
        torch.testing.assert_close(pooled[0], expected[is_here], rtol=0.0, atol=NOISE)


@pytest.mark.golden
def test_pooling_from_levels_is_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    levels = [torch.from_numpy(units[f"pooler_p{level}"]) for level in range(2, 6)]
    boxes = torch.stack([torch.from_numpy(units[f"pooler_boxes{picture}"]) for picture in (0, 1)])
    pooled = pool(levels, STRIDES_PX, boxes, 7, Sampling())
    expected = torch.from_numpy(units["pooler_out7"])
    torch.testing.assert_close(pooled.flatten(0, 1), expected, rtol=0.0, atol=NOISE)


@pytest.mark.golden
def test_levels_of_boxes_are_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    assigned = assign_levels(torch.from_numpy(units["levels_boxes"])[None], STRIDES_PX)
    assert assigned[0].tolist() == units["levels_out"].tolist()
