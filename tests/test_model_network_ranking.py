import math

import pytest
import torch
from torch import Tensor

from model.network.ranking import DECAY, rank

ROW = 10


def draw(*spans: tuple[int, int], sure: float = 1.0) -> Tensor:
    """One picture of one row of ten cells, a mask for each span."""
    masks = torch.zeros(1, len(spans), 1, ROW)
    for place, (first, last) in enumerate(spans):
        masks[0, place, 0, first:last] = sure
    return masks


def score(chances: list[float], masks: Tensor, things: Tensor | None = None) -> list[float]:
    everywhere = torch.ones(1, 1, ROW)
    found: list[list[float]] = rank(torch.tensor([chances]), masks, everywhere if things is None else things).tolist()
    return found[0]


def test_the_score_of_a_sure_mask_on_things_is_the_root_of_its_chance() -> None:
    assert score([0.25], draw((2, 5))) == pytest.approx([0.5], abs=1e-6)


def test_a_mask_that_shrinks_between_the_cuts_counts_by_what_stays() -> None:
    masks = draw((0, 4))
    masks[0, 0, 0, 2:4] = 0.8  # above 0.1, below 0.9
    assert score([1.0], masks) == pytest.approx([math.sqrt(2 / 4)], abs=1e-6)


def test_an_object_on_what_the_semantic_head_calls_stuff_counts_by_the_chance_of_things_inside() -> None:
    things = torch.zeros(1, 1, ROW)
    things[0, 0, :5] = 0.5
    assert score([1.0, 1.0], draw((3, 5), (4, 6)), things)[0] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert score([1.0], draw((7, 9)), things) == [0.0]


def test_the_worse_of_two_equal_masks_decays_and_the_better_does_not() -> None:
    found = score([0.25, 1.0], draw((2, 6), (2, 6)))
    assert found == pytest.approx([0.5 * math.exp(-DECAY), 1.0], abs=1e-6)


def test_of_two_alike_in_everything_the_first_stays() -> None:
    assert score([1.0, 1.0], draw((2, 6), (2, 6))) == pytest.approx([1.0, math.exp(-DECAY)], abs=1e-6)


def test_masks_apart_leave_each_other_alone() -> None:
    assert score([0.25, 1.0], draw((0, 3), (4, 8))) == pytest.approx([0.5, 1.0], abs=1e-6)


def test_a_rival_that_is_itself_a_duplicate_takes_less_away() -> None:
    # IoU of the first and second 8/10, of the first and third 4/10, of the second and third 4/8.
    found = score([1.0, 0.81, 0.64], draw((0, 10), (0, 8), (4, 8)))
    covered = {(0, 1): 8 / 10, (0, 2): 4 / 10, (1, 2): 4 / 8}
    second = math.exp(-DECAY * covered[0, 1] ** 2)
    third = min(
        math.exp(-DECAY * covered[0, 2] ** 2),
        math.exp(-DECAY * (covered[1, 2] ** 2 - covered[0, 1] ** 2)),
    )
    assert found == pytest.approx([1.0, 0.9 * second, 0.8 * third], abs=1e-6)


def test_a_query_that_draws_nothing_scores_nothing_and_disturbs_nobody() -> None:
    assert score([1.0, 0.25], draw((0, 0), (2, 6))) == pytest.approx([0.0, 0.5], abs=1e-6)


def test_what_is_no_number_stays_none() -> None:
    assert math.isnan(score([math.nan], draw((2, 6)))[0])


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    masks = torch.cat([draw((2, 6), (2, 6)), draw((0, 2), (4, 8))])
    found = rank(torch.ones(2, 2), masks, torch.ones(2, 1, ROW))
    assert found.flatten().tolist() == pytest.approx([1.0, math.exp(-DECAY), 1.0, 1.0], abs=1e-6)
