from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from model.formats.png import encode_panoptic_png
from training.data.dataset import LabeledPhoto
from training.mask_transformer.feature_dataset import PADDING, VOID, FeatureSample, make_target
from training.mask_transformer.instances import Instances
from training.mask_transformer.pixel_dataset import (
    AugmentParams,
    ImageBatch,
    PixelDataset,
    augment,
    color_jitter,
    split,
)
from training.trainer.task import IGNORE_INDEX

SIDE, CELLS = 32, 8
WHOLE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
MIRRORED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
LOWER_RIGHT = ((0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
HALVED_AT_TOP_RIGHT = ((2.0, 0.0, -1.0), (0.0, 2.0, 1.0))
"""As a placement: the new square's upper right quarter shows all of the old one."""


def draw_pictures() -> ImageBatch:
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
    return ImageBatch(
        pixels=pixels,
        semantic=semantic,
        masks=masks,
        owners=torch.tensor([0, 1]),
        clusters=torch.tensor([2, 0]),
        weights=torch.tensor([1.0, 0.5]),
    )


def draw(first: tuple[tuple[float, ...], ...] = WHOLE, second: tuple[tuple[float, ...], ...] = WHOLE) -> AugmentParams:
    """Nothing but views."""
    return AugmentParams(
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


def paste(pictures: ImageBatch, receiver: int, source: int) -> ImageBatch:
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
    assert color_jitter(pixels, torch.tensor([[2.0, 1.0, 1.0]])).flatten().tolist() == [200, 100, 0]
    assert color_jitter(pixels, torch.tensor([[9.0, 1.0, 1.0]])).flatten().tolist() == [255, 255, 0]
    # grey: 29.9 + 29.35 = 59.25
    assert color_jitter(pixels, torch.tensor([[1.0, 1.0, 0.0]])).flatten().tolist() == [59, 59, 59]
    two = torch.tensor([[100, 200]] * 3, dtype=torch.uint8).reshape(1, 3, 1, 2)
    assert color_jitter(two, torch.tensor([[1.0, 0.5, 1.0]]))[0, 0, 0].tolist() == [125, 175]


def test_what_shows_no_photo_keeps_its_colour() -> None:
    drawn = replace(draw(), colours=torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.0]]))
    seen = augment(draw_pictures(), drawn, SIDE)
    assert seen.pixels[1, 0, :, 31].tolist() == [50] * 28 + [100] * 4


@pytest.mark.parametrize("drops_unknown", [False, True])
def test_targets_are_those_of_the_other_path(drops_unknown: bool) -> None:
    pictures = draw_pictures()
    targets = split(pictures, drops_unknown=drops_unknown)
    for place, target in enumerate(targets):
        scene = FeatureSample(
            maps=np.zeros((1, 1, 1, 1), np.float16),
            square=np.zeros((3, 1, 1), np.uint8),
            semantic=pictures.semantic[place].numpy().astype(np.int16),
            objects=Instances(
                masks=pictures.masks[place : place + 1].numpy(),
                clusters=pictures.clusters[place : place + 1].numpy() + 1,
                weights=pictures.weights[place : place + 1].numpy(),
            ),
        )
        other = make_target(scene, drops_unknown=drops_unknown)
        for name in ("masks", "clusters", "weights", "semantic", "known"):
            assert torch.equal(getattr(target, name), getattr(other, name)), name
    assert IGNORE_INDEX in targets[0].semantic


def test_an_object_of_three_cells_is_no_target_and_a_picture_may_have_none() -> None:
    pictures = draw_pictures()
    pictures.masks[0] = False
    pictures.masks[0, 0, :3] = True
    assert [len(each.masks) for each in split(pictures, drops_unknown=False)] == [0, 1]


def store_photo(folder: Path, name: str, cluster: int = 1) -> LabeledPhoto:
    """A 56x28 photo of one colour, whose label says a thing of 14x14 at the left, stuff 3 elsewhere."""
    path = folder / f"{name}.png"
    cv2.imwrite(str(path), np.full((28, 56, 3), ord(name), np.uint8))
    labels = np.full((28, 56), 2, np.int32)
    labels[7:21, 7:21] = 1
    label = folder / f"{name}.label.png"
    label.write_bytes(encode_panoptic_png(labels))
    return LabeledPhoto(path=path, digest=name, label=label, categories={1: cluster, 2: 8})


def open_walk(photos: list[LabeledPhoto], **changes: Any) -> PixelDataset:
    plain = PixelDataset(
        photos=photos, side_px=56, thing_clusters=5, seed=0, paste_rate=0.0, crop_rate=0.0, jitter=0.0,
        pastes_alike=False, whole_masks=None,
    )  # fmt: skip
    return replace(plain, **changes)


def test_squares_are_an_eighth_larger_than_the_networks(tmp_path: Path) -> None:
    batch = open_walk([store_photo(tmp_path, "a")]).read(0, 2)
    pictures = batch.pictures
    assert pictures.pixels.shape == (2, 3, 64, 64)
    assert (pictures.pixels[:, :, :32] == ord("a")).all()
    assert pictures.masks.shape == (2, 16, 16)
    assert pictures.masks.sum((1, 2)).tolist() == [16, 16]  # 14 of 56 px are 16 of 64: four cells a side
    assert pictures.owners.tolist() == [0, 1]
    assert pictures.clusters.tolist() == [0, 0]
    assert pictures.semantic[0, 0, 0] == 3
    assert pictures.semantic[0, 8, 0] == -2


def test_without_crops_views_show_all_of_the_square_or_its_mirror_image(tmp_path: Path) -> None:
    drawn = open_walk([store_photo(tmp_path, "a")]).read(0, 16).drawn
    assert drawn.views[:, 0, 0].unique().tolist() == [-1.0, 1.0]
    assert (drawn.views[:, 1] == torch.tensor([0.0, 1.0, 0.0])).all()
    assert (drawn.colours == 1.0).all()


def test_crops_show_four_tenths_to_all_of_the_area_and_no_more_of_the_padding_than_they_must(tmp_path: Path) -> None:
    drawn = open_walk([store_photo(tmp_path, "a")], crop_rate=1.0, jitter=0.4).read(0, 64).drawn
    sides = drawn.views[:, 1, 1]
    assert 0.4 <= float(sides.square().min()) < 0.5
    assert 0.9 < float(sides.square().max()) <= 1.0
    assert torch.allclose(drawn.views[:, 1, 2], sides - 1, atol=1e-6)  # the photo is half as high: from the top
    left = drawn.views[:, 0, 2] - sides + 1
    assert float(left.min()) >= -1e-6
    assert float((left / 2 + sides).max()) <= 1 + 1e-6
    assert 0.6 <= float(drawn.colours.min()) < float(drawn.colours.max()) <= 1.4


def test_objects_come_from_another_picture_of_the_batch_and_lie_in_the_square(tmp_path: Path) -> None:
    photos = [store_photo(tmp_path, "a", 1), store_photo(tmp_path, "b", 1), store_photo(tmp_path, "c", 2)]
    for alike in (False, True):
        batch = open_walk(photos, paste_rate=1.0, pastes_alike=alike).read(0, 3)
        names = [path.stem for path in batch.photos]
        drawn, pictures = batch.drawn, batch.pictures
        moves = list(zip(drawn.receivers.tolist(), pictures.owners[drawn.pasted].tolist(), strict=True))
        pairs = {(names[to], names[source]) for to, source in moves}
        assert all(to != source for to, source in pairs)
        assert pairs == {("a", "b"), ("b", "a")} if alike else {to for to, _ in pairs} == {"a", "b", "c"}
        assert all(drawn.sources[to] == source for to, source in moves)
        ratio = 1.0 / drawn.placements[:, 0, 0]
        assert ((ratio >= 0.3) & (ratio <= 1.0)).all()
        corner = (-1.0 - drawn.placements[:, 0, 2]) / drawn.placements[:, 0, 0]  # where the source's left edge lies
        assert (corner >= -1.0 - 1e-5).all()
        assert (corner + 2 * ratio <= 1.0 + 1e-5).all()


def test_the_walk_is_the_same_each_time_and_meets_every_photo_once_an_epoch(tmp_path: Path) -> None:
    photos = [store_photo(tmp_path, name) for name in "abcd"]
    first, second = (open_walk(photos, paste_rate=0.5, crop_rate=0.5, jitter=0.4) for _ in range(2))
    second.read(4, 4)  # what was opened before changes nothing
    one, other = first.read(0, 4), second.read(0, 4)
    assert sorted(path.stem for path in one.photos) == list("abcd")
    assert one.photos == other.photos
    assert torch.equal(one.pictures.pixels, other.pictures.pixels)
    for name in ("views", "colours", "sources", "placements", "pasted", "receivers"):
        assert torch.equal(getattr(one.drawn, name), getattr(other.drawn, name)), name
