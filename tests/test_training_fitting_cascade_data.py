from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from model.encodings import encode_panoptic_png
from training.features import FeatureCache
from training.fitting.cascade.data import CascadeSamples, plan_size
from training.fitting.cascade.recipe import CASCADE_PRESETS, CascadeRecipe
from training.fitting.loop.trainee import IGNORE
from training.labels.store import StoredPhoto

RECIPE = replace(CASCADE_PRESETS["tiny"], short_sides_px=(28,), longest_side_px=100)
FROM_CACHE = replace(RECIPE, backbone="vit", inputs="features")


def store_photo(folder: Path, name: str) -> StoredPhoto:
    """A 28x56 photo, bright on the left, where thing 2 is; on the right stuff 3, and void in the two last columns."""
    image = np.full((28, 56, 3), 10, np.uint8)
    image[:, :28] = 250
    cv2.imwrite(str(folder / f"{name}.png"), image)
    labels = np.full((28, 56), 2, np.int32)
    labels[:, :28] = 1
    labels[:, 54:] = 0
    (folder / f"{name}.label.png").write_bytes(encode_panoptic_png(labels))
    maps = np.zeros((4, 4, 4, 2), np.float16)
    maps[-1, :, :2] = 1  # of the last block alone
    FeatureCache(folder).write(name, maps)
    path = folder / f"{name}.png"
    return StoredPhoto(path=path, digest=name, label=folder / f"{name}.label.png", categories={1: 2, 2: 8})


def outline(mask: np.ndarray, category: int) -> dict[str, object]:
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {"category_id": category, "segmentation": {"size": list(mask.shape), "counts": counts}}


def open_samples(folder: Path, recipe: CascadeRecipe = RECIPE, names: str = "a") -> CascadeSamples:
    """Two whole masks a photo: the left half, and the left two thirds, which overlap."""
    masks = np.zeros((2, 28, 56), bool)
    masks[0, :, :28] = True
    masks[1, :, :38] = True
    entries = [outline(masks[0], 2), outline(masks[1], 5)]
    return CascadeSamples(
        photos=[store_photo(folder, name) for name in names],
        masks=dict.fromkeys(names, entries),
        cache=FeatureCache(folder),
        thing_clusters=5,
        recipe=recipe,
    )


def test_a_photo_comes_with_its_whole_masks_and_its_stuff_mirrored_or_not(tmp_path: Path) -> None:
    batch = open_samples(tmp_path).read(0, 16)
    sides = set()
    for example in batch.examples:
        assert example.inputs.shape == (3, 28, 56)
        assert example.clusters.tolist() == [1, 4]
        assert example.masks.flatten(1).sum(1).tolist() == [28 * 28, 28 * 38]
        is_left = bool(example.masks[0, 0, 0])
        sides.add(is_left)
        bright, dark, void = (0, 50, 55) if is_left else (55, 5, 0)
        assert example.inputs[0, 5, bright] == 250
        assert example.inputs[0, 5, dark] == 10
        assert example.semantic[3, [bright, dark, void]].tolist() == [0, 3, IGNORE]
    assert sides == {True, False}


def test_photos_are_resized_to_one_of_the_short_sides_with_their_labels(tmp_path: Path) -> None:
    samples = open_samples(tmp_path, replace(RECIPE, short_sides_px=(14, 56), longest_side_px=84))
    examples = samples.read(0, 16).examples
    assert {tuple(each.masks.shape[1:]) for each in examples} == {(14, 28), (42, 84)}  # 56 would make the other 112
    for each in examples:
        assert each.inputs.shape[1:] == each.masks.shape[1:] == each.semantic.shape
        assert each.masks[0].float().mean() == 0.5


def test_sizes_are_the_references() -> None:
    # detectron2's ResizeShortestEdge on a 480x640 photo: 800 -> 800x1067; on a panorama the longer side decides.
    assert plan_size(480, 640, 800, 1333) == plan_size(480, 640, 800, 2000)
    assert (plan_size(480, 640, 800, 1333).height_px, plan_size(480, 640, 800, 1333).width_px) == (800, 1067)
    assert (plan_size(200, 1000, 800, 1333).height_px, plan_size(200, 1000, 800, 1333).width_px) == (267, 1333)


def test_cached_features_lie_on_a_canvas_of_sixteen_pixels_a_patch(tmp_path: Path) -> None:
    for example in open_samples(tmp_path, FROM_CACHE).read(0, 8).examples:
        assert (example.inputs.shape, example.cell_px, example.masks.shape) == ((2, 4, 4), 16, (2, 64, 64))
        left = bool(example.masks[0, 0, 0])
        assert (example.inputs[0, :, :2] == float(left)).all()
        assert example.masks[0, :32].float().mean() == 0.5
        assert not example.masks[:, 32:].any()  # the photo fills the upper half of the square
        assert (example.semantic[32:] == IGNORE).all()


def test_a_class_agnostic_fit_has_one_cluster(tmp_path: Path) -> None:
    example = open_samples(tmp_path, replace(RECIPE, is_agnostic=True)).read(0, 1).examples[0]
    assert example.clusters.tolist() == [0, 0]


def test_a_mask_too_small_to_see_is_no_label(tmp_path: Path) -> None:
    samples = open_samples(tmp_path, replace(RECIPE, short_sides_px=(7,)))
    dot = np.zeros((28, 56), bool)
    dot[0, 0] = True
    samples = replace(samples, masks={"a": [outline(dot, 1)]})
    example = samples.read(0, 1).examples[0]
    assert example.masks.shape == (0, 7, 14)
    assert example.clusters.shape == (0,)


def test_the_walk_is_the_same_however_it_is_cut_and_meets_every_photo_once_an_epoch(tmp_path: Path) -> None:
    samples = open_samples(tmp_path, names="abcde")
    whole = samples.read(0, 10)
    parts = samples.read(0, 3).examples + samples.read(3, 7).examples
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(whole.examples, parts, strict=True))
    names = [path.stem for path in whole.photos]
    assert sorted(names[:5]) == sorted(names[5:]) == list("abcde")
    assert names[:5] != names[5:]
