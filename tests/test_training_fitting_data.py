from pathlib import Path

import cv2
import numpy as np
import torch

from model.contract import Canvas
from model.encodings import encode_panoptic_png
from model.pixels import plan_placement
from training.features import FeatureCache
from training.fitting.data import IGNORE, Samples, make_target, place_labels
from training.labels.store import StoredPhoto


def store_photo(folder: Path, name: str, colour: int) -> StoredPhoto:
    """A 56x28 photo with a bright left half, whose label says thing 1 there and stuff 3 on the right."""
    image = np.full((28, 56, 3), colour, np.uint8)
    image[:, :28] = 250
    cv2.imwrite(str(folder / f"{name}.png"), image)
    labels = np.full((28, 56), 2, np.int32)
    labels[:, :28] = 1
    (folder / f"{name}.label.png").write_bytes(encode_panoptic_png(labels))
    maps = np.zeros((4, 4, 4, 2), np.float16)
    maps[:, :, :2] = 1
    FeatureCache(folder).write(name, maps)
    path = folder / f"{name}.png"
    return StoredPhoto(path=path, digest=name, label=folder / f"{name}.label.png", categories={1: 1, 2: 8})


def open_samples(folder: Path, photos: list[StoredPhoto]) -> Samples:
    return Samples(photos=photos, cache=FeatureCache(folder), side_px=56, thing_clusters=5, seed=0, paste_rate=0.0)


def test_labels_land_where_the_photo_does_and_padding_has_none() -> None:
    labels = np.full((28, 56), 2, np.int32)
    labels[:, :28] = 1
    placed = place_labels(labels, plan_placement(28, 56, [Canvas.square(56)], 4))
    assert placed.shape == (14, 14)
    assert (placed[:7, :7] == 1).all()
    assert (placed[:7, 7:] == 2).all()
    assert (placed[7:] == -1).all()


def test_a_target_has_thing_masks_stuff_numbers_and_ignores_the_rest() -> None:
    labels = np.full((20, 20), 2, np.int32)
    labels[5:10, 5:10] = 1
    labels[15:] = -1
    labels[0, 0] = 0
    target = make_target(labels, {1: 4, 2: 8}, thing_clusters=5)
    assert target.clusters.tolist() == [3]
    assert target.masks.sum() == 25
    assert target.semantic[7, 7] == 0
    assert target.semantic[0, 19] == 3
    assert target.semantic[0, 0] == IGNORE
    assert (target.semantic[15:] == IGNORE).all()
    assert target.semantic[3, 7] == IGNORE  # two cells above the thing: its halo
    assert target.semantic[2, 7] == 3


def test_a_thing_of_three_cells_is_no_target() -> None:
    labels = np.zeros((10, 10), np.int32)
    labels[0, :3] = 1
    assert len(make_target(labels, {1: 1}, thing_clusters=5).masks) == 0


def test_a_mirrored_sample_mirrors_photo_features_and_label_together(tmp_path: Path) -> None:
    samples = open_samples(tmp_path, [store_photo(tmp_path, "a", 10)])
    batch = samples.read(0, 16)
    sides = set()
    for index, target in enumerate(batch.targets):
        features = batch.features[0, index].unflatten(0, (4, 4))
        is_left = bool(features[0, 0, 0] == 1)
        sides.add(is_left)
        bright, dark = (0, 55) if is_left else (55, 0)
        assert batch.pixels[index, 0, 5, bright] == 250
        assert batch.pixels[index, 0, 5, dark] == 10
        assert target.masks[0, 3, bright // 4] == 1
        assert target.masks[0, 3, dark // 4] == 0
        assert target.semantic[3, dark // 4] == 3
    assert sides == {True, False}


def test_the_walk_is_the_same_however_it_is_cut_and_meets_every_photo_once_an_epoch(tmp_path: Path) -> None:
    photos = [store_photo(tmp_path, name, colour) for colour, name in enumerate("abcde", start=10)]
    samples = open_samples(tmp_path, photos)
    whole = samples.read(0, 10)
    parts = [samples.read(0, 3), samples.read(3, 7)]
    assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
    names = [path.name for path in whole.photos]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"{name}.png" for name in "abcde"]
    assert names[:5] != names[5:]
