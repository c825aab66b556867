from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from model.encodings import encode_panoptic_png
from training.fitting.transformer.pixel_data import PixelSamples
from training.labels.store import StoredPhoto


def store_photo(folder: Path, name: str, cluster: int = 1) -> StoredPhoto:
    """A 56x28 photo of one colour, whose label says a thing of 14x14 at the left, stuff 3 elsewhere."""
    path = folder / f"{name}.png"
    cv2.imwrite(str(path), np.full((28, 56, 3), ord(name), np.uint8))
    labels = np.full((28, 56), 2, np.int32)
    labels[7:21, 7:21] = 1
    label = folder / f"{name}.label.png"
    label.write_bytes(encode_panoptic_png(labels))
    return StoredPhoto(path=path, digest=name, label=label, categories={1: cluster, 2: 8})


def open_walk(photos: list[StoredPhoto], **changes: Any) -> PixelSamples:
    plain = PixelSamples(
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
