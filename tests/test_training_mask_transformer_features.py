import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from model.formats.png import encode_panoptic_png
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureCache
from training.mask_transformer.crops import CropView, CropWindow, crop_view, full_view, sample_crop
from training.mask_transformer.feature_dataset import FeatureDataset, FeatureSample, make_semantic_map, make_target
from training.mask_transformer.instances import InstanceMasks, instances_from_panoptic
from training.trainer.task import IGNORE_INDEX


def store_photo(folder: Path, name: str, colour: int) -> LabeledPhoto:
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
    return LabeledPhoto(path=path, digest=name, label=folder / f"{name}.label.png", categories={1: 1, 2: 8})


def open_walk(folder: Path, photos: list[LabeledPhoto], **changes: Any) -> FeatureDataset:
    plain = FeatureDataset(
        photos=photos, cache=FeatureCache(folder), side_px=56, thing_clusters=5, seed=0, paste_rate=0.0
    )
    return replace(plain, **changes)


def draw_scene(labels: np.ndarray, categories: dict[int, int]) -> FeatureSample:
    """What make_target reads of a scene with five thing clusters."""
    return FeatureSample(
        maps=np.zeros((1, 1, 1, 1), np.float16),
        square=np.zeros((3, 1, 1), np.uint8),
        semantic=make_semantic_map(labels, categories, thing_clusters=5),
        objects=instances_from_panoptic(labels, categories, thing_clusters=5),
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
    assert target.semantic[0, 0] == IGNORE_INDEX
    assert (target.semantic[15:] == IGNORE_INDEX).all()
    assert target.semantic[3, 7] == IGNORE_INDEX  # two cells above the thing: its halo
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


def test_a_whole_photo_lands_at_the_top_left_and_beside_it_is_nothing() -> None:
    values = np.full((28, 56), 2, np.int32)
    values[:, :28] = 1
    cells = full_view(28, 56, 56).cut_cells(values, -1)
    assert cells.shape == (14, 14)
    assert (cells[:7, :7] == 1).all()
    assert (cells[:7, 7:] == 2).all()
    assert (cells[7:] == -1).all()


def test_several_maps_are_cut_like_one() -> None:
    values = np.arange(30 * 40 * 3).reshape(30, 40, 3)
    whole = full_view(30, 40, 56)
    together = whole.cut_cells(values, 0)
    assert all((together[..., index] == whole.cut_cells(values[..., index], 0)).all() for index in range(3))


def show_quarter(whole: CropView) -> CropView:
    """The lower right quarter of the square, made as large."""
    return crop_view(whole, 4, CropWindow(top=2, left=2, side=2))


def test_a_window_of_half_the_side_shows_its_quarter_twice_as_large() -> None:
    frame = show_quarter(full_view(56, 56, 56))
    image = np.zeros((56, 56, 3), np.uint8)
    image[28:42, 28:56] = 200
    square = frame.cut_pixels(image)
    assert square.shape == (3, 56, 56)
    assert (square[:, 1:27, 1:] == 200).all()  # its rim mixes with what lies beside the window
    assert (square[:, 29:] == 0).all()
    assert frame.cut_cells(image[..., 0], 0)[:, 0].tolist() == [200] * 7 + [0] * 7


def test_features_of_a_window_are_those_of_its_patches_and_between_them_bilinear() -> None:
    maps = np.zeros((1, 4, 4, 1), np.float16)
    maps[0, 2:, 2:, 0] = [[0, 4], [0, 4]]
    part = show_quarter(full_view(56, 56, 56)).cut_maps(maps)
    assert part[0, :, :, 0].tolist() == [[0, 1, 3, 4]] * 4


def test_windows_stay_on_the_photo_and_have_half_to_all_of_the_side() -> None:
    whole = full_view(28, 56, 56)  # two of four rows of patches
    windows = [sample_crop(whole, 4, np.random.default_rng(seed)) for seed in range(60)]
    drawn = {(each.top, each.left, each.side) for each in windows}
    assert drawn == {(0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 0, 3), (0, 1, 3), (0, 0, 4)}


def test_a_window_of_everything_is_the_whole_photo() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    whole = full_view(40, 56, 56)
    frame = crop_view(whole, 4, CropWindow(top=0, left=0, side=4))
    assert (frame.cut_pixels(image) == whole.cut_pixels(image)).all()
    maps = np.random.default_rng(1).normal(size=(1, 4, 4, 2)).astype(np.float16)
    assert (frame.cut_maps(maps) == maps).all()


def describe(mask: np.ndarray, cluster: int, **score: float) -> dict[str, object]:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return {"image_id": 1, "category_id": cluster, "segmentation": segmentation, **score}


def write_store(folder: Path, annotations: list[dict[str, object]]) -> PseudoLabelDataset:
    images = [{"id": 1, "sha256": "a"}, {"id": 2, "sha256": "b"}]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return PseudoLabelDataset(folder)


def test_whole_masks_overlap_and_come_best_first_with_their_scores_as_weights(tmp_path: Path) -> None:
    left, all_over, corner = (np.zeros((28, 56), bool) for _ in range(3))
    left[:, :28] = all_over[:] = corner[:4, :4] = True
    store = write_store(
        tmp_path, [describe(left, 2, score=0.5), describe(all_over, 3), describe(corner, 1, score=0.25)]
    )
    objects = InstanceMasks.read(store, most=2).show("a", full_view(28, 56, 56))
    assert objects.clusters.tolist() == [3, 2]
    assert objects.weights.tolist() == [1.0, 0.5]
    assert objects.masks.sum((1, 2)).tolist() == [7 * 14, 7 * 7]
    assert objects.masks[1, :7, :7].all()


def test_a_score_above_one_weighs_one_and_a_mask_of_no_score_is_no_target(tmp_path: Path) -> None:
    mask = np.ones((28, 56), bool)
    store = write_store(tmp_path, [describe(mask, 1, score=8.5), describe(mask, 2, score=0.0)])
    masks = InstanceMasks.read(store, most=5)
    assert masks.show("a", full_view(28, 56, 56)).weights.tolist() == [1.0]
    assert masks.list_clusters("a") == {1}


def test_a_photo_without_masks_has_no_objects(tmp_path: Path) -> None:
    masks = InstanceMasks.read(write_store(tmp_path, []), most=5)
    assert masks.show("b", full_view(28, 56, 56)).masks.shape == (0, 14, 14)
    assert masks.list_clusters("b") == set()


def test_merged_objects_are_the_things_of_the_map_equally_sure() -> None:
    labels = np.array([[1, 1, 2], [0, 3, 2]], np.int32)
    objects = instances_from_panoptic(labels, {1: 4, 2: 7, 3: 2}, thing_clusters=5)
    assert objects.clusters.tolist() == [4, 2]
    assert objects.masks.sum((1, 2)).tolist() == [2, 1]
    assert objects.weights.tolist() == [1.0, 1.0]
