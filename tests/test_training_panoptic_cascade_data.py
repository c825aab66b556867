"""Training samples of the panoptic cascade, copy-paste and padding."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from coco_reference import annotate

from model.formats.png import encode_panoptic_png
from training.data.dataset import LabeledPhoto
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.panoptic_cascade.dataset import (
    CascadeDataset,
    CascadeSample,
    copy_paste_batch,
    copy_paste_pair,
    pad_to_batch,
)
from training.trainer.task import IGNORE_INDEX, PhotoSampler

CONFIG = replace(CASCADE_PRESETS["tiny"], min_sizes=(28,), max_size=100)


def write_photo(folder: Path, name: str) -> LabeledPhoto:
    """A 28x56 photo with a bright left half, which is thing 2; the right is stuff 3, void in the two last columns."""
    image = np.full((28, 56, 3), 10, np.uint8)
    image[:, :28] = 250
    cv2.imwrite(str(folder / f"{name}.png"), image)
    label_map = np.full((28, 56), 2, np.int32)
    label_map[:, :28] = 1
    label_map[:, 54:] = 0
    (folder / f"{name}.label.png").write_bytes(encode_panoptic_png(label_map))
    path = folder / f"{name}.png"
    return LabeledPhoto(path=path, digest=name, label=folder / f"{name}.label.png", categories={1: 2, 2: 8})


def make_dataset(folder: Path, config: CascadeTrainConfig = CONFIG, names: str = "a") -> CascadeDataset:
    """Two overlapping instances per photo: the left half, and the left two thirds."""
    masks = np.zeros((2, 28, 56), bool)
    masks[0, :, :28] = True
    masks[1, :, :38] = True
    return CascadeDataset(
        sampler=PhotoSampler(photos=[write_photo(folder, name) for name in names], seed=0),
        instances={name: [annotate(masks[0], 2), annotate(masks[1], 5)] for name in names},
        thing_clusters=5,
        config=config,
    )


def test_samples_have_whole_masks_and_stuff_mirrored_or_not(tmp_path: Path) -> None:
    sides = set()
    for sample in make_dataset(tmp_path).load_batch(0, 16).samples:
        assert sample.pixels.shape == (3, 28, 56)
        assert sample.clusters.tolist() == [1, 4]
        assert sample.masks.flatten(1).sum(1).tolist() == [28 * 28, 28 * 38]
        is_left = bool(sample.masks[0, 0, 0])
        sides.add(is_left)
        bright, dark, void = (0, 50, 55) if is_left else (55, 5, 0)
        assert sample.pixels[0, 5, bright] == 250
        assert sample.pixels[0, 5, dark] == 10
        assert sample.semantic[3, [bright, dark, void]].tolist() == [0, 3, IGNORE_INDEX]
    assert sides == {True, False}


def test_photos_and_labels_are_resized_to_one_of_the_sizes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, replace(CONFIG, min_sizes=(14, 56), max_size=84))
    samples = dataset.load_batch(0, 16).samples
    # With a short side of 56, the long side would be 112.
    assert {tuple(each.masks.shape[1:]) for each in samples} == {(14, 28), (42, 84)}
    for each in samples:
        assert each.pixels.shape[1:] == each.masks.shape[1:] == each.semantic.shape
        assert each.masks[0].float().mean() == 0.5


def draw_sample(
    color: int, *boxes: tuple[int, int, int, int], clusters: list[int] | None = None, size: tuple[int, int] = (40, 60)
) -> CascadeSample:
    """A photo of one color and stuff 1 with instances of twice the color; boxes are top, left, bottom, right."""
    pixels = torch.full((3, *size), color, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    semantic = torch.ones(size, dtype=torch.int64)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
        pixels[:, mask] = 2 * color
        semantic[mask] = 0
    numbers = torch.tensor(clusters or list(range(len(boxes))), dtype=torch.int64)
    return CascadeSample(pixels=pixels, masks=masks, clusters=numbers, semantic=semantic)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_pasted_instance_brings_its_pixels_mask_and_cluster() -> None:
    source = draw_sample(100, (0, 0, 40, 60), clusters=[7])
    for seed in range(10):
        pasted = copy_paste_pair(draw_sample(10), source, 0.3, rng(seed))
        assert pasted.clusters.tolist() == [7]
        mask = pasted.masks[0]
        height, width = (len(torch.nonzero(mask.any(axis))) for axis in (1, 0))
        assert mask.sum() == height * width  # the whole source, scaled equally on both sides
        assert 12 <= height <= 40
        assert abs(height / 40 - width / 60) < 0.03
        assert (pasted.pixels[:, mask] == 200).all()
        assert (pasted.pixels[:, ~mask] == 10).all()
        assert torch.equal(pasted.semantic == 0, mask)


def test_pasted_instances_occlude_others() -> None:
    pasted = copy_paste_pair(draw_sample(10, (0, 0, 40, 60)), draw_sample(100, (0, 0, 20, 30)), 0.5, rng(0))
    assert len(pasted.masks) == 2
    assert not (pasted.masks[0] & pasted.masks[1]).any()
    assert (pasted.masks[0] | pasted.masks[1]).all()


def test_an_instance_that_would_cover_half_of_another_is_not_pasted() -> None:
    sample = draw_sample(10, (19, 29, 21, 31), (0, 0, 4, 4))
    pasted = copy_paste_pair(sample, draw_sample(100, (0, 0, 40, 60)), 1.0, rng(0))
    assert torch.equal(pasted.masks, sample.masks)
    assert torch.equal(pasted.pixels, sample.pixels)


def test_instances_come_from_the_opposite_sample_or_from_one_of_the_same_class() -> None:
    first, second = draw_sample(10, clusters=[]), draw_sample(20, (0, 0, 9, 9), clusters=[3])
    third = draw_sample(30, (10, 10, 20, 20), (0, 40, 20, 60), clusters=[3, 5])
    batch = (first, second, third)
    any_class = copy_paste_batch(batch, "any", 1.0, rng(0))
    assert set(any_class[0].clusters.tolist()) <= {3, 5}
    assert any_class[0].clusters.numel() == 1
    assert any_class[2].clusters.tolist() == [3, 5]  # the first has no instances
    same_class = copy_paste_batch(batch, "same-class", 1.0, rng(0))
    assert same_class[0].clusters.tolist() == []  # no common cluster
    assert set(same_class[1].clusters.tolist()) == {3}  # never the third's instance of cluster 5
    assert sorted(set(same_class[2].clusters.tolist())) == [3, 5]
    assert copy_paste_batch(batch, "none", 1.0, rng(0)) == batch


def test_samples_of_different_sizes_are_padded_with_ignored_pixels() -> None:
    padded = pad_to_batch((draw_sample(10, (2, 3, 9, 20)), draw_sample(20, size=(70, 33))), 32)
    assert padded.pixels.shape == (2, 3, 96, 64)
    assert padded.sizes.tolist() == [[40, 60], [70, 33]]
    assert padded.targets[0].boxes.tolist() == [[3.0, 2.0, 20.0, 9.0]]
    assert (padded.pixels[0, :, 40:] == 0).all()
    assert (padded.targets[0].semantic[40:] == IGNORE_INDEX).all()
    assert (padded.targets[1].semantic[:70, :33] == 1).all()
    assert padded.targets[1].boxes.shape == (0, 4)
