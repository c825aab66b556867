import pytest
import torch

from training.panoptic_cascade.matching import covered_fraction, draw, ignore_unlabeled, match, pairwise_box_iou

OBJECT = [0.0, 0.0, 10.0, 10.0]
HALF = [0.0, 0.0, 10.0, 5.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_the_overlaps_of_two_sets_are_known() -> None:
    overlaps = pairwise_box_iou(torch.tensor([OBJECT, FAR]), torch.tensor([HALF, [5.0, 0.0, 15.0, 10.0], [3.0] * 4]))
    torch.testing.assert_close(overlaps, torch.tensor([[0.5, 1 / 3, 0.0], [0.0, 0.0, 0.0]]))


def test_a_box_is_on_an_object_on_nothing_or_neither() -> None:
    matches = match(torch.tensor([OBJECT, HALF, FAR]), torch.tensor([FAR, OBJECT]), 0.3, 0.7)
    assert matches.kind.tolist() == [1, -1, 1]
    assert matches.nearest.tolist() == [1, 1, 0]
    assert match(torch.tensor([HALF]), torch.tensor([OBJECT]), 0.5, 0.5).kind.tolist() == [1]  # from 0.5 on
    assert match(torch.tensor([HALF]), torch.tensor([OBJECT]), 0.6, 0.6).kind.tolist() == [0]


def test_the_best_box_of_an_object_is_on_it_however_little_it_overlaps() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 2.0], HALF, HALF, FAR])
    assert match(boxes, torch.tensor([OBJECT]), 0.3, 0.7, keeps_best=True).kind.tolist() == [0, 1, 1, 0]
    nowhere = torch.tensor([[80.0, 80.0, 90.0, 90.0]])
    assert match(boxes, nowhere, 0.3, 0.7, keeps_best=True).kind.tolist() == [0, 0, 0, 0]


def test_without_objects_every_box_is_on_nothing() -> None:
    assert match(torch.tensor([OBJECT]), torch.zeros(0, 4), 0.3, 0.7, keeps_best=True).kind.tolist() == [0]


def test_at_most_a_share_is_drawn_from_objects_and_the_rest_from_nothing() -> None:
    kind = torch.tensor([1] * 10 + [0] * 20 + [-1] * 10)
    positive, negative = draw(kind, 16, 0.25, seed())
    assert (len(positive), len(negative)) == (4, 12)
    assert (kind[positive] == 1).all()
    assert (kind[negative] == 0).all()
    assert len(set(positive.tolist())) == 4
    few, rest = draw(kind[8:], 16, 0.25, seed())  # two boxes on objects
    assert (len(few), len(rest)) == (2, 14)
    assert len(draw(kind[-15:], 16, 0.25, seed())[1]) == 5  # no more than there are


def test_what_is_drawn_hangs_on_the_seed_alone() -> None:
    kind = torch.zeros(50, dtype=torch.int64)
    assert torch.equal(draw(kind, 9, 0.5, seed(1))[1], draw(kind, 9, 0.5, seed(1))[1])
    assert not torch.equal(draw(kind, 9, 0.5, seed(1))[1], draw(kind, 9, 0.5, seed(2))[1])


def test_the_share_of_a_box_in_an_area_is_counted_within_the_picture() -> None:
    area = torch.zeros(20, 30, dtype=torch.bool)
    area[:, :15] = True
    boxes = torch.tensor([[10.0, 0.0, 20.0, 10.0], [-10.0, -5.0, 20.0, 10.0], [20.0, 5.0, 25.0, 8.0], [40.0] * 4])
    assert covered_fraction(area, boxes).tolist() == pytest.approx([0.5, 0.75, 0.0, 0.0])


def test_a_box_on_nothing_that_lies_on_unlabelled_ground_is_not_judged() -> None:
    ignored = torch.zeros(20, 20, dtype=torch.bool)
    ignored[:, :10] = True
    boxes = torch.tensor([[0.0, 0.0, 16.0, 20.0], [4.0, 0.0, 20.0, 20.0], [0.0, 0.0, 10.0, 10.0]])
    kind = torch.tensor([0, 0, 1])
    assert ignore_unlabeled(kind, boxes, ignored, 0.5).tolist() == [-1, 0, 1]
    assert ignore_unlabeled(kind, boxes, ignored, 1.0).tolist() == [0, 0, 1]
