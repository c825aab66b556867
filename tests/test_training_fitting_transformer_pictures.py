from dataclasses import replace

import numpy as np
import pytest
import torch

from training.fitting.loop.trainee import IGNORE
from training.fitting.transformer.augment import PADDING, VOID, Scene
from training.fitting.transformer.data import make_target
from training.fitting.transformer.objects import Objects
from training.fitting.transformer.pictures import Drawn, Pictures, augment, recolour, split

SIDE, CELLS = 32, 8
WHOLE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
MIRRORED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
LOWER_RIGHT = ((0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
HALVED_AT_TOP_RIGHT = ((2.0, 0.0, -1.0), (0.0, 2.0, 1.0))
"""As a placement: the new square's upper right quarter shows all of the old one."""


def draw_pictures() -> Pictures:
    """Black with a white object in the lower right quarter, cluster 2; and grey with a light one on the left, 0.

    Stuff 1 is around the first; the second has no label, and shows no photo in its last row of cells.
    """
    masks = torch.zeros(2, CELLS, CELLS, dtype=torch.bool)
    masks[0, 4:, 4:] = True
    masks[1, :, :2] = True
    semantic = torch.full((2, CELLS, CELLS), VOID)
    semantic[0] = 1
    semantic[masks] = 0
    semantic[1, 7] = PADDING
    pixels = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    pixels[1] = 100
    pixels[0, :, 16:, 16:] = 255
    pixels[1, :, :, :8] = 200
    return Pictures(
        pixels=pixels,
        semantic=semantic,
        masks=masks,
        owners=torch.tensor([0, 1]),
        clusters=torch.tensor([2, 0]),
        weights=torch.tensor([1.0, 0.5]),
    )


def draw(first: tuple[tuple[float, ...], ...] = WHOLE, second: tuple[tuple[float, ...], ...] = WHOLE) -> Drawn:
    """Nothing but views."""
    return Drawn(
        views=torch.tensor([first, second]),
        colours=torch.ones(2, 3),
        sources=torch.arange(2),
        placements=torch.tensor([WHOLE, WHOLE]),
        pasted=torch.zeros(0, dtype=torch.int64),
        receivers=torch.zeros(0, dtype=torch.int64),
    )


def test_whole_views_and_factors_of_one_change_nothing() -> None:
    pictures = draw_pictures()
    same = augment(pictures, draw(), SIDE)
    for name in ("pixels", "semantic", "masks", "owners", "clusters", "weights"):
        assert torch.equal(getattr(same, name), getattr(pictures, name)), name


def test_a_window_and_a_mirror_show_the_same_in_pixels_and_labels() -> None:
    seen = augment(draw_pictures(), draw(LOWER_RIGHT, MIRRORED), SIDE)
    assert seen.masks[0].all()
    assert (seen.semantic[0] == 0).all()
    assert (seen.pixels[0, :, 1:, 1:] == 255).all()  # the rim mixes with what lies beside the window
    assert seen.masks[1].sum(0).tolist() == [0] * 6 + [8] * 2
    assert seen.pixels[1, 0, 0].tolist() == [100] * 24 + [200] * 8


def test_a_larger_square_is_brought_to_the_networks_size() -> None:
    seen = augment(draw_pictures(), draw(), 16)
    assert seen.pixels.shape == (2, 3, 16, 16)
    assert seen.masks.shape == (2, 4, 4)
    assert seen.masks[0].sum() == 4


def paste(pictures: Pictures, receiver: int, source: int) -> Pictures:
    drawn = replace(
        draw(),
        sources=torch.tensor([source, source]),
        placements=torch.tensor([HALVED_AT_TOP_RIGHT] * 2),
        pasted=torch.tensor([source]),
        receivers=torch.tensor([receiver]),
    )
    return augment(pictures, drawn, SIDE)


def test_a_pasted_object_is_at_one_place_in_pixels_and_labels() -> None:
    pasted = paste(draw_pictures(), receiver=1, source=0)
    assert pasted.owners.tolist() == [0, 1, 1]
    assert pasted.clusters.tolist() == [2, 0, 2]
    assert pasted.weights.tolist() == [1.0, 0.5, 1.0]
    expected = torch.zeros(CELLS, CELLS, dtype=torch.bool)
    expected[2:4, 6:] = True  # the lower right of the upper right
    assert torch.equal(pasted.masks[2], expected)
    assert (pasted.semantic[1][expected] == 0).all()
    changed = (pasted.pixels[1] != draw_pictures().pixels[1]).any(0)
    assert not changed[:8].any()
    assert (pasted.pixels[1, :, 9:15, 25:] == 255).all()
    assert torch.equal(pasted.pixels[0], draw_pictures().pixels[0])


def test_what_a_pasted_object_hides_is_no_longer_the_other_ones() -> None:
    pictures = draw_pictures()
    pictures.masks[0, :, 4:] = True  # an upright half, of which an eighth will be hidden
    pasted = paste(pictures, receiver=0, source=1)
    assert pasted.owners.tolist() == [0, 0, 1]
    assert pasted.clusters.tolist() == [2, 0, 0]
    assert pasted.masks[1].nonzero().tolist() == [[row, 4] for row in range(4)]
    assert pasted.masks[0].sum() == 28
    assert not (pasted.masks[0] & pasted.masks[1]).any()


def test_an_object_that_is_hidden_by_more_than_half_goes() -> None:
    pictures = draw_pictures()
    pictures.masks[0] = False
    pictures.masks[0, :3, 4] = True
    assert paste(pictures, receiver=0, source=1).clusters.tolist() == [0, 0]


def test_nothing_is_pasted_where_there_is_no_photo() -> None:
    pictures = draw_pictures()
    pictures.semantic[1, :4] = PADDING
    pasted = paste(pictures, receiver=1, source=0)
    assert not pasted.masks[2].any()
    assert torch.equal(pasted.pixels[1], pictures.pixels[1])


def test_colours_by_hand() -> None:
    pixels = torch.tensor([100, 50, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert recolour(pixels, torch.tensor([[2.0, 1.0, 1.0]])).flatten().tolist() == [200, 100, 0]
    assert recolour(pixels, torch.tensor([[9.0, 1.0, 1.0]])).flatten().tolist() == [255, 255, 0]
    # grey: 29.9 + 29.35 = 59.25
    assert recolour(pixels, torch.tensor([[1.0, 1.0, 0.0]])).flatten().tolist() == [59, 59, 59]
    two = torch.tensor([[100, 200]] * 3, dtype=torch.uint8).reshape(1, 3, 1, 2)
    assert recolour(two, torch.tensor([[1.0, 0.5, 1.0]]))[0, 0, 0].tolist() == [125, 175]


def test_what_shows_no_photo_keeps_its_colour() -> None:
    drawn = replace(draw(), colours=torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.0]]))
    seen = augment(draw_pictures(), drawn, SIDE)
    assert seen.pixels[1, 0, :, 31].tolist() == [50] * 28 + [100] * 4


@pytest.mark.parametrize("drops_unknown", [False, True])
def test_targets_are_those_of_the_other_path(drops_unknown: bool) -> None:
    pictures = draw_pictures()
    targets = split(pictures, drops_unknown=drops_unknown)
    for place, target in enumerate(targets):
        scene = Scene(
            maps=np.zeros((1, 1, 1, 1), np.float16),
            square=np.zeros((3, 1, 1), np.uint8),
            semantic=pictures.semantic[place].numpy().astype(np.int16),
            objects=Objects(
                masks=pictures.masks[place : place + 1].numpy(),
                clusters=pictures.clusters[place : place + 1].numpy() + 1,
                weights=pictures.weights[place : place + 1].numpy(),
            ),
        )
        other = make_target(scene, drops_unknown=drops_unknown)
        for name in ("masks", "clusters", "weights", "semantic", "known"):
            assert torch.equal(getattr(target, name), getattr(other, name)), name
    assert IGNORE in targets[0].semantic


def test_an_object_of_three_cells_is_no_target_and_a_picture_may_have_none() -> None:
    pictures = draw_pictures()
    pictures.masks[0] = False
    pictures.masks[0, 0, :3] = True
    assert [len(each.masks) for each in split(pictures, drops_unknown=False)] == [0, 1]
