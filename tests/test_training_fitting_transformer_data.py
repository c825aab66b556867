from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from model.encodings import encode_panoptic_png
from training.features import FeatureCache
from training.fitting.loop.trainee import IGNORE
from training.fitting.transformer.augment import Scene
from training.fitting.transformer.data import Samples, make_target, read_semantic
from training.fitting.transformer.objects import read_merged
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


def open_walk(folder: Path, photos: list[StoredPhoto], **changes: Any) -> Samples:
    plain = Samples(photos=photos, cache=FeatureCache(folder), side_px=56, thing_clusters=5, seed=0, paste_rate=0.0)
    return replace(plain, **changes)


def draw_scene(labels: np.ndarray, categories: dict[int, int]) -> Scene:
    """What make_target reads of a scene with five thing clusters."""
    return Scene(
        maps=np.zeros((1, 1, 1, 1), np.float16),
        square=np.zeros((3, 1, 1), np.uint8),
        semantic=read_semantic(labels, categories, thing_clusters=5),
        objects=read_merged(labels, categories, thing_clusters=5),
    )


def test_a_target_has_thing_masks_stuff_numbers_and_ignores_the_rest() -> None:
    labels = np.full((20, 20), 2, np.int32)
    labels[5:10, 5:10] = 1
    labels[15:] = -1
    labels[0, 0] = 0
    target = make_target(draw_scene(labels, {1: 4, 2: 8}), drops_unknown=False)
    assert target.clusters.tolist() == [3]
    assert target.weights.tolist() == [1.0]
    assert target.masks.sum() == 25
    assert target.semantic[7, 7] == 0
    assert target.semantic[0, 19] == 3
    assert target.semantic[0, 0] == IGNORE
    assert (target.semantic[15:] == IGNORE).all()
    assert target.semantic[3, 7] == IGNORE  # two cells above the thing: its halo
    assert target.semantic[2, 7] == 3
    assert target.known.all()


def test_only_void_and_things_without_a_mask_are_unknown() -> None:
    labels = np.full((20, 20), 2, np.int32)
    labels[5:10, 5:10] = 1
    labels[15:] = -1
    labels[0, :3] = 0
    labels[12, :3] = 3  # too small to be an object
    target = make_target(draw_scene(labels, {1: 4, 2: 8, 3: 5}), drops_unknown=True)
    unknown = np.argwhere(~target.known.numpy()).tolist()
    assert unknown == [[0, 0], [0, 1], [0, 2], [12, 0], [12, 1], [12, 2]]


def test_a_thing_of_three_cells_is_no_target() -> None:
    labels = np.zeros((10, 10), np.int32)
    labels[0, :3] = 1
    assert len(make_target(draw_scene(labels, {1: 1}), drops_unknown=False).masks) == 0


def test_a_window_shows_photo_features_and_labels_of_the_same_place(tmp_path: Path) -> None:
    samples = open_walk(tmp_path, [store_photo(tmp_path, "a", 10)], crop_rate=1.0)
    batch = samples.read(0, 24)
    widths = set()
    for index, target in enumerate(batch.targets):
        bright = (batch.pixels[index, 0] == 250).sum(1)[4]
        thing = target.masks[:, 1].sum() * 4
        loud = batch.features[0, index, :4, 0].sum() * 14
        widths.add(int(thing))
        assert abs(bright - thing) <= 4  # a cell, where the border is not between two
        assert abs(loud - thing) <= 14  # a patch
    assert len(widths) > 3


def test_alike_pasting_takes_photos_that_share_a_cluster(tmp_path: Path) -> None:
    first, second, third = (store_photo(tmp_path, name, 10) for name in "abc")
    third = replace(third, categories={1: 2, 2: 8})
    loud = np.full((4, 4, 4, 2), 7, np.float16)
    FeatureCache(tmp_path).write("c", loud)
    photos = [first, second, third]
    pasted = open_walk(tmp_path, photos, paste_rate=1.0, pastes_alike=True).read(0, 30)
    for index, (path, target) in enumerate(zip(pasted.photos, pasted.targets, strict=True)):
        if path != third.path:
            assert 7 not in pasted.features[:, index]
            assert set(target.clusters.tolist()) == {0}
    anyhow = open_walk(tmp_path, photos, paste_rate=1.0).read(0, 30)
    assert {1 for path, target in zip(anyhow.photos, anyhow.targets, strict=True)
            if path != third.path and 1 in target.clusters}  # fmt: skip


def test_a_mirrored_sample_mirrors_photo_features_and_label_together(tmp_path: Path) -> None:
    samples = open_walk(tmp_path, [store_photo(tmp_path, "a", 10)])
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
    samples = open_walk(tmp_path, photos)
    whole = samples.read(0, 10)
    parts = [samples.read(0, 3), samples.read(3, 7)]
    assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
    names = [path.name for path in whole.photos]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"{name}.png" for name in "abcde"]
    assert names[:5] != names[5:]
