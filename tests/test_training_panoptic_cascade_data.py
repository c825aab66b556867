from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from model.formats.png import encode_panoptic_png
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.panoptic_cascade.dataset import (
    CascadeDataset,
    CascadeSample,
    copy_paste_batch,
    copy_paste_pair,
    hflip_sample,
    pad_to_batch,
    plan_size,
)
from training.trainer.task import IGNORE_INDEX

RECIPE = replace(CASCADE_PRESETS["tiny"], short_sides_px=(28,), longest_side_px=100)
FROM_CACHE = replace(RECIPE, backbone="vit", inputs="features")


def store_photo(folder: Path, name: str) -> LabeledPhoto:
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
    return LabeledPhoto(path=path, digest=name, label=folder / f"{name}.label.png", categories={1: 2, 2: 8})


def outline(mask: np.ndarray, category: int) -> dict[str, object]:
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {"category_id": category, "segmentation": {"size": list(mask.shape), "counts": counts}}


def open_samples(folder: Path, recipe: CascadeTrainConfig = RECIPE, names: str = "a") -> CascadeDataset:
    """Two whole masks a photo: the left half, and the left two thirds, which overlap."""
    masks = np.zeros((2, 28, 56), bool)
    masks[0, :, :28] = True
    masks[1, :, :38] = True
    entries = [outline(masks[0], 2), outline(masks[1], 5)]
    return CascadeDataset(
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
        assert example.semantic[3, [bright, dark, void]].tolist() == [0, 3, IGNORE_INDEX]
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
        assert (example.semantic[32:] == IGNORE_INDEX).all()


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


CELL = 16


def draw(
    colour: int, *boxes: tuple[int, int, int, int], clusters: list[int] | None = None, side: tuple[int, int] = (40, 60)
) -> CascadeSample:
    """A photo of one colour and stuff 1 with objects of twice the colour; boxes are top, left, bottom, right."""
    pixels = torch.full((3, *side), colour, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), *side, dtype=torch.bool)
    semantic = torch.ones(side, dtype=torch.int64)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
        pixels[:, mask] = 2 * colour
        semantic[mask] = 0
    numbers = torch.tensor(clusters or list(range(len(boxes))), dtype=torch.int64)
    return CascadeSample(inputs=pixels, cell_px=1, masks=masks, clusters=numbers, semantic=semantic)


def seed(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


def test_a_mirrored_example_mirrors_picture_masks_and_stuff_together() -> None:
    mirrored = hflip_sample(draw(50, (0, 0, 10, 20)))
    assert mirrored.masks[0, :10, 40:].all()
    assert mirrored.masks.sum() == 200
    assert (mirrored.inputs[:, mirrored.masks[0]] == 100).all()
    assert torch.equal(mirrored.semantic == 0, mirrored.masks[0])


def test_a_pasted_object_brings_its_pixels_its_mask_and_its_cluster() -> None:
    source = draw(100, (0, 0, 40, 60), clusters=[7])
    for number in range(10):
        pasted = copy_paste_pair(draw(10), source, 0.3, seed(number))
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
    pasted = copy_paste_pair(example, source, 0.5, seed(0))
    assert len(pasted.masks) == 2
    assert not (pasted.masks[0] & pasted.masks[1]).any()
    assert (pasted.masks[0] | pasted.masks[1]).all()


def test_an_object_that_would_cover_half_of_another_is_left_out() -> None:
    example = draw(10, (19, 29, 21, 31), (0, 0, 4, 4))
    pasted = copy_paste_pair(example, draw(100, (0, 0, 40, 60)), 1.0, seed(0))
    assert torch.equal(pasted.masks, example.masks)
    assert torch.equal(pasted.inputs, example.inputs)


def test_all_but_one_of_the_objects_are_pasted_at_most() -> None:
    source = draw(100, (0, 0, 5, 5), (10, 10, 15, 15), (20, 20, 25, 25), (30, 30, 35, 35))
    counts = {len(copy_paste_pair(draw(10), source, 1.0, seed(number)).masks) for number in range(30)}
    assert counts == {1, 2, 3}


def test_objects_come_from_the_mirrored_place_in_the_batch_or_from_kin() -> None:
    first, second = draw(10, clusters=[]), draw(20, (0, 0, 9, 9), clusters=[3])
    third = draw(30, (10, 10, 20, 20), (0, 40, 20, 60), clusters=[3, 5])
    batch = (first, second, third)
    crossed = copy_paste_batch(batch, "any", 1.0, seed(0))
    assert set(crossed[0].clusters.tolist()) <= {3, 5}
    assert crossed[0].clusters.numel() == 1
    assert crossed[2].clusters.tolist() == [3, 5]  # the first has nothing to give
    kin = copy_paste_batch(batch, "semantic", 1.0, seed(0))
    assert kin[0].clusters.tolist() == []  # it has no cluster that another one has
    assert set(kin[1].clusters.tolist()) == {3}  # never the third's object of cluster 5
    assert sorted(set(kin[2].clusters.tolist())) == [3, 5]
    assert copy_paste_batch(batch, "none", 1.0, seed(0)) == batch


def draw_features(value: float, *, is_object: bool) -> CascadeSample:
    """A 4 x 4 grid of patches; the object covers the two upper rows."""
    masks = torch.zeros(int(is_object), 4 * CELL, 4 * CELL, dtype=torch.bool)
    masks[:, : 2 * CELL] = True
    return CascadeSample(
        inputs=torch.full((2, 4, 4), value, dtype=torch.float16), cell_px=CELL, masks=masks,
        clusters=torch.zeros(int(is_object), dtype=torch.int64), semantic=torch.ones(4 * CELL, 4 * CELL).long(),
    )  # fmt: skip


def test_features_are_pasted_by_whole_patches() -> None:
    for number in range(10):
        pasted = copy_paste_pair(
            draw_features(1.0, is_object=False), draw_features(5.0, is_object=True), 0.5, seed(number)
        )
        patches = pasted.masks[0].reshape(4, CELL, 4, CELL).float().mean((1, 3))
        moved = pasted.inputs[0] == 5.0
        assert torch.equal(moved, patches >= 0.5)
        assert (pasted.inputs[0][~moved] == 1.0).all()
        assert moved.any()


def test_examples_of_several_sizes_share_a_canvas_whose_rest_has_no_label() -> None:
    laid = pad_to_batch((draw(10, (2, 3, 9, 20)), draw(20, side=(70, 33))), 32)
    assert laid.inputs.shape == (2, 3, 96, 64)
    assert laid.sizes.tolist() == [[40, 60], [70, 33]]
    assert laid.objects[0].boxes.tolist() == [[3.0, 2.0, 20.0, 9.0]]
    assert (laid.inputs[0, :, 40:] == 0).all()
    assert (laid.objects[0].semantic[40:] == IGNORE_INDEX).all()
    assert (laid.objects[1].semantic[:70, :33] == 1).all()
    assert laid.objects[1].boxes.shape == (0, 4)
