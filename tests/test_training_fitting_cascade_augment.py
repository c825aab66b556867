import numpy as np
import torch

from training.fitting.cascade.augment import Example, lay_out, mirror, paste_across, paste_objects
from training.fitting.loop.trainee import IGNORE

CELL = 16


def draw(
    colour: int, *boxes: tuple[int, int, int, int], clusters: list[int] | None = None, side: tuple[int, int] = (40, 60)
) -> Example:
    """A photo of one colour and stuff 1 with objects of twice the colour; boxes are top, left, bottom, right."""
    pixels = torch.full((3, *side), colour, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), *side, dtype=torch.bool)
    semantic = torch.ones(side, dtype=torch.int64)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
        pixels[:, mask] = 2 * colour
        semantic[mask] = 0
    numbers = torch.tensor(clusters or list(range(len(boxes))), dtype=torch.int64)
    return Example(inputs=pixels, cell_px=1, masks=masks, clusters=numbers, semantic=semantic)


def seed(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


def test_a_mirrored_example_mirrors_picture_masks_and_stuff_together() -> None:
    mirrored = mirror(draw(50, (0, 0, 10, 20)))
    assert mirrored.masks[0, :10, 40:].all()
    assert mirrored.masks.sum() == 200
    assert (mirrored.inputs[:, mirrored.masks[0]] == 100).all()
    assert torch.equal(mirrored.semantic == 0, mirrored.masks[0])


def test_a_pasted_object_brings_its_pixels_its_mask_and_its_cluster() -> None:
    source = draw(100, (0, 0, 40, 60), clusters=[7])
    for number in range(10):
        pasted = paste_objects(draw(10), source, 0.3, seed(number))
        assert pasted.clusters.tolist() == [7]
        mask = pasted.masks[0]
        rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
        height, width = len(rows), len(columns)
        assert mask.sum() == height * width  # the whole source, squeezed by one share on both sides
        assert 12 <= height <= 40
        assert abs(height / 40 - width / 60) < 0.03
        assert (pasted.inputs[:, mask] == 200).all()
        assert (pasted.inputs[:, ~mask] == 10).all()
        assert torch.equal(pasted.semantic == 0, mask)


def test_what_is_pasted_over_is_lost_and_vanishes_if_nothing_is_left() -> None:
    example = draw(10, (0, 0, 40, 60))
    source = draw(100, (0, 0, 20, 30))
    pasted = paste_objects(example, source, 0.5, seed(0))
    assert len(pasted.masks) == 2
    assert not (pasted.masks[0] & pasted.masks[1]).any()
    assert (pasted.masks[0] | pasted.masks[1]).all()


def test_an_object_that_would_cover_half_of_another_is_left_out() -> None:
    example = draw(10, (19, 29, 21, 31), (0, 0, 4, 4))
    pasted = paste_objects(example, draw(100, (0, 0, 40, 60)), 1.0, seed(0))
    assert torch.equal(pasted.masks, example.masks)
    assert torch.equal(pasted.inputs, example.inputs)


def test_all_but_one_of_the_objects_are_pasted_at_most() -> None:
    source = draw(100, (0, 0, 5, 5), (10, 10, 15, 15), (20, 20, 25, 25), (30, 30, 35, 35))
    counts = {len(paste_objects(draw(10), source, 1.0, seed(number)).masks) for number in range(30)}
    assert counts == {1, 2, 3}


def test_objects_come_from_the_mirrored_place_in_the_batch_or_from_kin() -> None:
    first, second = draw(10, clusters=[]), draw(20, (0, 0, 9, 9), clusters=[3])
    third = draw(30, (10, 10, 20, 20), (0, 40, 20, 60), clusters=[3, 5])
    batch = (first, second, third)
    crossed = paste_across(batch, "any", 1.0, seed(0))
    assert set(crossed[0].clusters.tolist()) <= {3, 5}
    assert crossed[0].clusters.numel() == 1
    assert crossed[2].clusters.tolist() == [3, 5]  # the first has nothing to give
    kin = paste_across(batch, "semantic", 1.0, seed(0))
    assert kin[0].clusters.tolist() == []  # it has no cluster that another one has
    assert set(kin[1].clusters.tolist()) == {3}  # never the third's object of cluster 5
    assert sorted(set(kin[2].clusters.tolist())) == [3, 5]
    assert paste_across(batch, "none", 1.0, seed(0)) == batch


def draw_features(value: float, *, is_object: bool) -> Example:
    """A 4 x 4 grid of patches; the object covers the two upper rows."""
    masks = torch.zeros(int(is_object), 4 * CELL, 4 * CELL, dtype=torch.bool)
    masks[:, : 2 * CELL] = True
    return Example(
        inputs=torch.full((2, 4, 4), value, dtype=torch.float16), cell_px=CELL, masks=masks,
        clusters=torch.zeros(int(is_object), dtype=torch.int64), semantic=torch.ones(4 * CELL, 4 * CELL).long(),
    )  # fmt: skip


def test_features_are_pasted_by_whole_patches() -> None:
    for number in range(10):
        pasted = paste_objects(
            draw_features(1.0, is_object=False), draw_features(5.0, is_object=True), 0.5, seed(number)
        )
        patches = pasted.masks[0].reshape(4, CELL, 4, CELL).float().mean((1, 3))
        moved = pasted.inputs[0] == 5.0
        assert torch.equal(moved, patches >= 0.5)
        assert (pasted.inputs[0][~moved] == 1.0).all()
        assert moved.any()


def test_examples_of_several_sizes_share_a_canvas_whose_rest_has_no_label() -> None:
    laid = lay_out((draw(10, (2, 3, 9, 20)), draw(20, side=(70, 33))), 32)
    assert laid.inputs.shape == (2, 3, 96, 64)
    assert laid.sizes.tolist() == [[40, 60], [70, 33]]
    assert laid.objects[0].boxes.tolist() == [[3.0, 2.0, 20.0, 9.0]]
    assert (laid.inputs[0, :, 40:] == 0).all()
    assert (laid.objects[0].semantic[40:] == IGNORE).all()
    assert (laid.objects[1].semantic[:70, :33] == 1).all()
    assert laid.objects[1].boxes.shape == (0, 4)
