"""Crops, instance targets, and training samples on cached features."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coco_reference import annotate
from tiny import write_labeled

from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureCache
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.mask_transformer.feature_dataset import FeatureDataset, FeatureSample, copy_paste
from training.mask_transformer.samples import (
    PADDING,
    CropView,
    Instances,
    LabelReader,
    Sample,
    Targets,
    collate,
    full_view,
    make_targets,
    sample_crop,
    select_instances,
)
from training.trainer.task import IGNORE_INDEX, PhotoSampler

SIDE_PX, MAP_SIDE, GRID = 56, 14, 4
CONFIG = replace(MASK_TRANSFORMER_PRESETS["panoptic-targets"], copy_paste_prob=0.0)
Boxes = tuple[tuple[slice, slice], ...]
CORNER = (slice(0, 8), slice(0, 8))


def write_photo(folder: Path, name: str, color: int) -> LabeledPhoto:
    """A 56x28 photo with a bright left half, which is thing 1; the right half is stuff 3."""
    image, label_map = np.full((28, 56, 3), color, np.uint8), np.full((28, 56), 2, np.int32)
    image[:, :28], label_map[:, :28] = 250, 1
    features = np.zeros((4, GRID, GRID, 2), np.float16)
    features[:, :, :2] = 1
    FeatureCache(folder).write(name, features)
    return write_labeled(folder, name, image, label_map, {1: 1, 2: 8})


def make_dataset(folder: Path, photos: list[LabeledPhoto], **changes: Any) -> FeatureDataset:
    return FeatureDataset(
        sampler=PhotoSampler(photos=photos, seed=0),
        cache=FeatureCache(folder),
        labels=LabelReader(thing_clusters=5, annotations=None),
        side_px=SIDE_PX,
        config=replace(CONFIG, **changes),
    )


def label(*things: tuple[slice, slice], cluster: int, droploss: bool) -> Targets:
    """Targets of 20x20 map pixels: things on stuff 3, no label at the upper left, and padding in the last five rows."""
    semantic, masks = np.full((20, 20), 3, np.int16), np.zeros((len(things), 20, 20), bool)
    for mask, box in zip(masks, things, strict=True):
        mask[box] = True
    semantic[masks.any(0)] = 0
    semantic[15:] = PADDING
    semantic[0, :3] = IGNORE_INDEX
    weights = np.ones(len(things), np.float32)
    instances = Instances(masks=masks, clusters=np.full(len(things), cluster), weights=weights)
    sample = Sample(pixels=np.zeros((3, 1, 1), np.uint8), semantic=semantic, instances=instances)
    return make_targets(collate([sample]), droploss=droploss)


def draw_sample(shade: int, feature: float, boxes: Boxes = (), cluster: int = 1) -> FeatureSample:
    """A uniform sample; instances, given as rows and columns of the map, are 20 brighter and have features + 10."""
    masks, pixels = np.zeros((len(boxes), MAP_SIDE, MAP_SIDE), bool), np.full((3, SIDE_PX, SIDE_PX), shade, np.uint8)
    features = np.full((2, GRID, GRID, 1), feature, np.float16)
    for mask, (rows, columns) in zip(masks, boxes, strict=True):
        mask[rows, columns] = True
    union = np.array(masks.any(0))
    pixels[:, to_pixels(union)] += 20
    features[:, to_pixels(union)[7::14, 7::14]] += 10
    instances = Instances(masks=masks, clusters=np.full(len(boxes), cluster), weights=np.ones(len(boxes), np.float32))
    semantic = np.where(union, 0, IGNORE_INDEX).astype(np.int16)
    return FeatureSample(features=features, pixels=pixels, semantic=semantic, instances=instances)


def to_pixels(mask: np.ndarray) -> np.ndarray:
    return mask.repeat(4, 0).repeat(4, 1)


def paste(
    sample: FeatureSample, source: FeatureSample, seed: int, clusters: frozenset[int] | None = None
) -> FeatureSample:
    return copy_paste(sample, source, np.random.default_rng(seed), clusters)


THING, TINY_THING = (slice(5, 10), slice(5, 10)), (slice(12, 13), slice(0, 3))


def test_targets_have_thing_masks_and_stuff_classes_and_ignore_void_padding_and_a_band() -> None:
    target = label(THING, cluster=4, droploss=False)
    assert target.clusters.tolist() == [3]
    assert target.weights.tolist() == [1.0]
    assert target.masks.sum() == 25
    assert target.semantic[0, 7, 7] == 0
    assert target.semantic[0, 0, 19] == 3
    assert target.semantic[0, 0, 0] == IGNORE_INDEX
    assert (target.semantic[0, 15:] == IGNORE_INDEX).all()
    assert target.semantic[0, 3, 7] == IGNORE_INDEX  # two pixels above the thing: in the band
    assert target.semantic[0, 2, 7] == 3
    assert target.is_labeled.all()


def test_with_droploss_void_and_things_without_a_mask_are_unlabeled() -> None:
    target = label(THING, TINY_THING, cluster=4, droploss=True)
    unlabeled = np.argwhere(~target.is_labeled[0].numpy()).tolist()
    assert unlabeled == [[0, 0], [0, 1], [0, 2], [12, 0], [12, 1], [12, 2]]


def test_crop_and_mirroring_apply_to_pixels_features_and_labels(tmp_path: Path) -> None:
    batch = make_dataset(tmp_path, [write_photo(tmp_path, "a", 10)], crop_prob=1.0).load_batch(0, 24)
    shown = set()
    images = batch.images
    assert images.image_indices.tolist() == list(range(24))
    for index, mask in enumerate(images.masks):
        is_bright = images.pixels[index, 0, 4] == 250
        is_thing = mask[1]
        shown.add((int(is_thing.sum()), bool(is_thing[0])))
        assert (is_thing != is_bright[2::4]).sum() <= 1  # a map pixel, where the border is not between two
        assert ((batch.features[0, index, :GRID, 0] == 1) != is_bright[7::14]).sum() <= 1  # a patch
        assert ((images.semantic[index, 1] == 0) == is_thing).all()
    assert len({width for width, _ in shown}) > 3
    assert {is_left for width, is_left in shown if width < MAP_SIDE} == {True, False}


def test_same_class_copy_paste_takes_photos_that_share_a_cluster(tmp_path: Path) -> None:
    first, second, third = (write_photo(tmp_path, name, 10) for name in "abc")
    third = replace(third, categories={1: 2, 2: 8})
    FeatureCache(tmp_path).write("c", np.full((4, GRID, GRID, 2), 7, np.float16))
    photos = [first, second, third]
    pasted = make_dataset(tmp_path, photos, copy_paste_prob=1.0, copy_paste_same_class=True).load_batch(0, 30)
    is_third = torch.tensor([path == third.path for path in pasted.photos])
    assert 7 not in pasted.features[:, ~is_third]
    assert set(pasted.images.clusters[~is_third[pasted.images.image_indices]].tolist()) == {0}
    images = make_dataset(tmp_path, photos, copy_paste_prob=1.0).load_batch(0, 30).images
    assert 1 in images.clusters[~is_third[images.image_indices]]


def test_samples_do_not_depend_on_the_batch_size_and_each_epoch_has_every_photo_once(tmp_path: Path) -> None:
    photos = [write_photo(tmp_path, name, color) for color, name in enumerate("abcde", start=10)]
    samples = make_dataset(tmp_path, photos)
    whole = samples.load_batch(0, 10)
    parts = [samples.load_batch(0, 3), samples.load_batch(3, 7)]
    assert torch.equal(whole.images.pixels, torch.cat([part.images.pixels for part in parts]))
    names = [path.name for path in whole.photos]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"{name}.png" for name in "abcde"]
    assert names[:5] != names[5:]


# Copy-paste


def test_a_pasted_instance_is_at_the_same_position_in_pixels_labels_and_features() -> None:
    empty, source = draw_sample(10, 0), draw_sample(100, 50, (CORNER,), cluster=3)
    positions = set()
    for seed in range(30):
        sample = paste(empty, source, seed)
        (mask,) = sample.instances.masks
        assert sample.instances.clusters.tolist() == [3]
        assert (sample.semantic == np.where(mask, 0, IGNORE_INDEX)).all()
        assert (sample.pixels[:, to_pixels(mask)] == 120).all()
        assert (sample.pixels[:, ~to_pixels(mask)] == 10).all()
        # four patches, or one if halved
        assert ((sample.features == 60).sum(), (sample.features == 0).sum()) in {(8, 24), (2, 30)}
        assert (sample.features[:, to_pixels(mask)[7::14, 7::14]] == 60).all()
        positions.add((int(mask.sum()), *map(int, np.argwhere(mask)[0])))
    assert {size for size, *_ in positions} == {64, 16}
    assert len(positions) > 4


def test_where_masks_overlap_the_half_covered_instance_is_removed_instead() -> None:
    whole, part = (slice(0, 14), slice(0, 14)), (slice(0, 2), slice(0, 2))
    sample, source = draw_sample(10, 0, (whole, part)), draw_sample(100, 50, (CORNER,), cluster=3)
    clusters = set()
    for seed in range(30):
        instances = paste(sample, source, seed).instances
        clusters.add(tuple(instances.clusters.tolist()))
        assert not (instances.masks[0] & instances.masks[-1]).any()
        assert instances.masks[0].sum() + instances.masks[-1].sum() == 14 * 14
    assert clusters == {(1, 1, 3), (1, 3)}


def test_a_pasted_instance_brings_its_parts_but_not_its_neighbors() -> None:
    part, neighbor = (slice(2, 4), slice(2, 4)), (slice(7, 9), slice(0, 8))
    source = draw_sample(100, 50, (CORNER, part, neighbor))
    source.instances.weights[:] = (1.0, 0.25, 0.25)  # the part has median weight, but is too small on its own
    seen = set()
    for seed in range(30):
        instances = paste(draw_sample(10, 0), source, seed).instances
        sizes = instances.masks.sum((1, 2)).tolist()
        if 64 in sizes:
            start = sizes.index(64)
            seen.add(tuple(sizes[start : start + 2]))
            assert (instances.masks[start] | ~instances.masks[start + 1]).all()
            assert instances.weights[start : start + 2].tolist() == [1.0, 0.25]
    assert seen == {(64, 4)}


def test_nothing_is_pasted_into_padding() -> None:
    sample, source = draw_sample(10, 0), draw_sample(100, 50, (CORNER,))
    sample.semantic[7:] = PADDING
    for seed in range(30):
        pasted = paste(sample, source, seed)
        assert (pasted.semantic[7:] == PADDING).all()
        assert not pasted.instances.masks[:, 7:].any()


# Crops


def lower_right_quarter(whole: CropView) -> CropView:
    return replace(whole, top=2, left=2, side=2)


def test_a_crop_of_half_the_side_is_twice_as_large() -> None:
    view = lower_right_quarter(full_view(56, 56, SIDE_PX, GRID))
    image = np.zeros((56, 56, 3), np.uint8)
    image[28:42, 28:56] = 200
    pixels = view.crop_image(image)
    assert pixels.shape == (3, 56, 56)
    assert (pixels[:, 1:27, 1:] == 200).all()  # the border mixes with pixels outside the crop
    assert (pixels[:, 29:] == 0).all()
    assert view.crop_labels(image[..., 0], 0)[:, 0].tolist() == [200] * 7 + [0] * 7


def test_sampled_crops_lie_in_the_photo_and_have_half_to_all_of_the_side() -> None:
    whole = full_view(28, 56, SIDE_PX, GRID)  # two of four rows of patches
    views = [sample_crop(whole, np.random.default_rng(seed)) for seed in range(60)]
    sampled = {(each.top, each.left, each.side) for each in views}
    assert sampled == {(0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 0, 3), (0, 1, 3), (0, 0, 4)}


# Instance masks


def test_instance_masks_may_overlap_and_are_sorted_by_score_which_is_the_weight(tmp_path: Path) -> None:
    left, everything, corner = (np.zeros((28, 56), bool) for _ in range(3))
    left[:, :28] = everything[:] = corner[:4, :4] = True
    annotations = [annotate(left, 2, score=0.5), annotate(everything, 3), annotate(corner, 1, score=0.25)]
    content = {"images": [{"id": 1, "sha256": "a"}], "annotations": [{"image_id": 1, **each} for each in annotations]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    selected = select_instances(PseudoLabelDataset(tmp_path), max_per_photo=2)
    reader = LabelReader(thing_clusters=5, annotations=selected)
    _, instances = reader.read(write_photo(tmp_path, "a", 10), full_view(28, 56, SIDE_PX))
    assert instances.clusters.tolist() == [3, 2]
    assert instances.weights.tolist() == [1.0, 0.5]
    assert instances.masks.sum((1, 2)).tolist() == [7 * 14, 7 * 7]
    assert instances.masks[1, :7, :7].all()
