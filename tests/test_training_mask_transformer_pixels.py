"""Training samples from pixels and their augmentation on tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_labeled

from training.data.dataset import LabeledPhoto
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.mask_transformer.pixel_dataset import (
    AugmentParams,
    PixelDataset,
    augment_batch,
    color_jitter,
)
from training.mask_transformer.samples import PADDING, ImageBatch, LabelReader
from training.trainer.task import IGNORE_INDEX, PhotoSampler

SIDE, MAP_SIDE = 32, 8
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
MIRRORED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
LOWER_RIGHT = ((0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
HALVED_AT_TOP_RIGHT = ((2.0, 0.0, -1.0), (0.0, 2.0, 1.0))
"""As a paste transform: the upper right quarter of the target shows all of the source."""
CONFIG = replace(MASK_TRANSFORMER_PRESETS["panoptic-targets"], inputs="pixels", copy_paste_prob=0.0, color_jitter=0.0)


def draw_images() -> ImageBatch:
    """A black image with a white instance of cluster 2 at the lower right, and a gray one with a light one at the left.

    The first has stuff 1 around its instance; the second has no other label, and padding in its last map row.
    """
    masks = torch.zeros(2, MAP_SIDE, MAP_SIDE, dtype=torch.bool)
    masks[0, 4:, 4:] = True
    masks[1, :, :2] = True
    semantic = torch.full((2, MAP_SIDE, MAP_SIDE), IGNORE_INDEX)
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
        image_indices=torch.tensor([0, 1]),
        clusters=torch.tensor([2, 0]),
        weights=torch.tensor([1.0, 0.5]),
    )


def transform(
    first: tuple[tuple[float, ...], ...] = IDENTITY, second: tuple[tuple[float, ...], ...] = IDENTITY
) -> AugmentParams:
    """Parameters without color jitter and copy-paste."""
    return AugmentParams(
        transforms=torch.tensor([first, second]),
        color_factors=torch.ones(2, 3),
        source_images=torch.arange(2),
        paste_transforms=torch.tensor([IDENTITY, IDENTITY]),
        pasted_instances=torch.zeros(0, dtype=torch.int64),
        target_images=torch.zeros(0, dtype=torch.int64),
    )


def test_crop_and_mirroring_apply_to_pixels_and_labels() -> None:
    augmented = augment_batch(draw_images(), transform(LOWER_RIGHT, MIRRORED), SIDE)
    assert augmented.masks[0].all()
    assert (augmented.semantic[0] == 0).all()
    assert (augmented.pixels[0, :, 1:, 1:] == 255).all()  # the border mixes with pixels outside the crop
    assert augmented.masks[1].sum(0).tolist() == [0] * 6 + [8] * 2
    assert augmented.pixels[1, 0, 0].tolist() == [100] * 24 + [200] * 8


def paste(images: ImageBatch, target: int, source: int) -> ImageBatch:
    params = replace(
        transform(),
        source_images=torch.tensor([source, source]),
        paste_transforms=torch.tensor([HALVED_AT_TOP_RIGHT] * 2),
        pasted_instances=torch.tensor([source]),
        target_images=torch.tensor([target]),
    )
    return augment_batch(images, params, SIDE)


def test_a_pasted_instance_is_at_the_same_position_in_pixels_and_labels() -> None:
    pasted = paste(draw_images(), target=1, source=0)
    assert pasted.image_indices.tolist() == [0, 1, 1]
    assert pasted.clusters.tolist() == [2, 0, 2]
    assert pasted.weights.tolist() == [1.0, 0.5, 1.0]
    expected = torch.zeros(MAP_SIDE, MAP_SIDE, dtype=torch.bool)
    expected[2:4, 6:] = True  # the lower right of the upper right
    assert torch.equal(pasted.masks[2], expected)
    assert (pasted.semantic[1][expected] == 0).all()
    changed = (pasted.pixels[1] != draw_images().pixels[1]).any(0)
    assert not changed[:8].any()
    assert (pasted.pixels[1, :, 9:15, 25:] == 255).all()
    assert torch.equal(pasted.pixels[0], draw_images().pixels[0])


def test_a_pasted_instance_occludes_others() -> None:
    images = draw_images()
    images.masks[0, :, 4:] = True  # the right half, of which an eighth will be hidden
    pasted = paste(images, target=0, source=1)
    assert pasted.image_indices.tolist() == [0, 0, 1]
    assert pasted.clusters.tolist() == [2, 0, 0]
    assert pasted.masks[1].nonzero().tolist() == [[row, 4] for row in range(4)]
    assert pasted.masks[0].sum() == 28
    assert not (pasted.masks[0] & pasted.masks[1]).any()


def test_nothing_is_pasted_into_padding() -> None:
    images = draw_images()
    images.semantic[1, :4] = PADDING
    pasted = paste(images, target=1, source=0)
    assert not pasted.masks[2].any()
    assert torch.equal(pasted.pixels[1], images.pixels[1])


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((2.0, 1.0, 1.0), [200, 100, 0]),
        ((9.0, 1.0, 1.0), [255, 255, 0]),
        ((1.0, 1.0, 0.0), [59, 59, 59]),  # gray: 29.9 + 29.35 = 59.25
    ],
)
def test_color_jitter_scales_brightness_and_saturation(factors: tuple[float, ...], expected: list[int]) -> None:
    pixels = torch.tensor([100, 50, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert color_jitter(pixels, torch.tensor([factors])).flatten().tolist() == expected


def write_photo(folder: Path, name: str, cluster: int = 1) -> LabeledPhoto:
    """A 56x28 photo of one color, with a thing of 14x14 at the left on stuff 3."""
    label_map = np.full((28, 56), 2, np.int32)
    label_map[7:21, 7:21] = 1
    return write_labeled(folder, name, np.full((28, 56, 3), ord(name), np.uint8), label_map, {1: cluster, 2: 8})


def make_dataset(photos: list[LabeledPhoto], **changes: Any) -> PixelDataset:
    return PixelDataset(
        sampler=PhotoSampler(photos=photos, seed=0),
        labels=LabelReader(thing_clusters=5, annotations=None),
        side_px=56,
        config=replace(CONFIG, **changes),
    )


def test_crops_show_40_to_100_percent_of_the_area_with_as_little_padding_as_possible(tmp_path: Path) -> None:
    photos = [write_photo(tmp_path, "a")]
    params = make_dataset(photos, crop_prob=1.0, color_jitter=0.4).load_batch(0, 64).params
    sides = params.transforms[:, 1, 1]
    assert 0.4 <= float(sides.square().min()) < 0.5
    assert 0.9 < float(sides.square().max()) <= 1.0
    assert torch.allclose(params.transforms[:, 1, 2], sides - 1, atol=1e-6)  # the photo has half the height: at the top
    left = params.transforms[:, 0, 2] - sides + 1
    assert float(left.min()) >= -1e-6
    assert float((left / 2 + sides).max()) <= 1 + 1e-6
    assert 0.6 <= float(params.color_factors.min()) < float(params.color_factors.max()) <= 1.4


@pytest.mark.parametrize("same_class", [False, True])
def test_instances_are_pasted_from_another_photo_of_the_batch_inside_the_square(
    tmp_path: Path, same_class: bool
) -> None:
    photos = [write_photo(tmp_path, "a", 1), write_photo(tmp_path, "b", 1), write_photo(tmp_path, "c", 2)]
    batch = make_dataset(photos, copy_paste_prob=1.0, copy_paste_same_class=same_class).load_batch(0, 3)
    names = [path.stem for path in batch.photos]
    params, images = batch.params, batch.images
    sources = images.image_indices[params.pasted_instances].tolist()
    pairs = list(zip(params.target_images.tolist(), sources, strict=True))
    assert all(target != source for target, source in pairs)
    assert all(params.source_images[target] == source for target, source in pairs)
    pasted = {(names[target], names[source]) for target, source in pairs}
    assert pasted == {("a", "b"), ("b", "a")} if same_class else {to for to, _ in pasted} == {"a", "b", "c"}
    scale = 1.0 / params.paste_transforms[:, 0, 0]
    assert ((scale >= 0.3) & (scale <= 1.0)).all()
    left = (-1.0 - params.paste_transforms[:, 0, 2]) / params.paste_transforms[:, 0, 0]  # of the pasted source
    assert (left >= -1.0 - 1e-5).all()
    assert (left + 2 * scale <= 1.0 + 1e-5).all()
