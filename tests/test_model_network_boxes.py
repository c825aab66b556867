"""Boxes drawn by hand move, meet and are cut as arithmetic says, and as detectron2's."""

import math
from pathlib import Path

import pytest
import reference
import torch

from model.network.boxes import Weights, clip, compare, decode, encode, has_area, measure_area

ONES = (1.0, 1.0, 1.0, 1.0)
BOX = torch.tensor([10.0, 20.0, 30.0, 60.0])


def test_deltas_are_shifts_in_sides_and_growths_in_logarithms() -> None:
    # Centre (20, 40), sides 20 and 40: to the right by half its width, down by a quarter of its height, twice as wide.
    target = torch.tensor([10.0, 30.0, 50.0, 70.0])
    expected = torch.tensor([0.5, 0.25, math.log(2.0), 0.0])
    torch.testing.assert_close(encode(BOX, target, ONES), expected)
    torch.testing.assert_close(decode(BOX, expected, ONES), target)


def test_weights_scale_the_deltas() -> None:
    weights = (10.0, 20.0, 5.0, 4.0)
    target = torch.tensor([10.0, 30.0, 50.0, 70.0])
    expected = torch.tensor([5.0, 5.0, 5.0 * math.log(2.0), 0.0])
    torch.testing.assert_close(encode(BOX, target, weights), expected)
    torch.testing.assert_close(decode(BOX, expected, weights), target)


def test_a_wild_growth_stops_at_1000_over_16() -> None:
    grown = decode(BOX, torch.tensor([0.0, 0.0, 1e6, 0.0]), ONES)
    assert (grown[2] - grown[0]).item() == pytest.approx(20.0 * 62.5, rel=1e-5)  # float32


def test_boxes_are_cut_to_their_own_picture() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 50.0, 50.0]]).expand(2, 1, 4)
    cut = clip(boxes, torch.tensor([[20, 30], [60, 40]]))
    assert cut.tolist() == [[[0.0, 0.0, 30.0, 20.0]], [[0.0, 0.0, 40.0, 50.0]]]


def test_a_box_without_a_side_has_no_area() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0], [1.0, 5.0, 2.0, 5.0], [math.nan] * 4])
    assert has_area(boxes).tolist() == [True, False, False, False]
    assert measure_area(boxes[0]).item() == 6.0


def test_overlaps_of_pairs_counted_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0], [9.0, 9.0, 9.0, 9.0]]])
    # Half of each is shared: 8 / 24. An empty box overlaps nothing, not even itself.
    expected = torch.tensor([[[1.0, 1 / 3, 0.0], [1 / 3, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(compare(boxes), expected)


@pytest.mark.golden
@pytest.mark.parametrize("stage", range(4))
def test_the_codec_is_the_references(golden: Path, stage: int) -> None:
    units = {key: torch.from_numpy(array) for key, array in reference.read_units(golden).items()}
    along_x, along_y, of_width, of_height = units[f"b2b_w{stage}_weights"].tolist()
    weights: Weights = (along_x, along_y, of_width, of_height)
    encoded = encode(units["b2b_src"], units["b2b_tgt"], weights)
    # float32 of boxes up to 3,700 px
    torch.testing.assert_close(encoded, units[f"b2b_w{stage}_encode"], rtol=1e-6, atol=1e-6)
    for deltas, key in ((units["b2b_deltas_in"], "decode"), (encoded, "roundtrip")):
        decoded = decode(units["b2b_src"], deltas, weights)
        torch.testing.assert_close(decoded, units[f"b2b_w{stage}_{key}"], rtol=1e-6, atol=1e-4)
