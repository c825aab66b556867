"""The semantic head is detectron2's."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from model.network.semantic import SemanticHead
from model.pixels import resize_map


def draw_levels(batch: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, 4, 16 >> level, 24 >> level, generator=generator) for level in range(5))


def draw_head() -> SemanticHead:
    torch.manual_seed(2)
    return SemanticHead(4, 32, 3).requires_grad_(False)


def test_logits_come_at_the_finest_level_and_every_level_but_the_last_counts() -> None:
    head, levels = draw_head(), draw_levels()
    logits = head(levels)
    assert logits.shape == (1, 3, 16, 24)
    for index in range(5):
        dark = tuple(torch.zeros_like(maps) if level == index else maps for level, maps in enumerate(levels))
        assert torch.equal(head(dark), logits) == (index == 4)


def test_a_picture_alone_and_in_a_batch_gets_the_same_logits() -> None:
    head, levels = draw_head(), draw_levels(3)
    together = head(levels)
    for index in range(3):
        alone = head(tuple(maps[index : index + 1] for maps in levels))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_logits_are_the_references(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    reference.check_near(network.sem_seg_head(case.levels), case.tensor("sem_logits_s4"), reference.SEMANTIC_NOISE)


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_maps_in_the_pictures_size_are_the_references(golden: Path, name: str) -> None:
    """Four times as large, cut to the picture, then to the size that was asked for."""
    arrays = reference.read_case(golden, name).arrays
    height, width = arrays["image_uint8"].shape[:2]
    out_height, out_width = (int(length) for length in arrays["out_hw"])
    maps = []
    for logits in arrays["sem_logits_s4"]:
        large = resize_map(logits, 4 * logits.shape[0], 4 * logits.shape[1])
        maps.append(resize_map(large[:height, :width], out_height, out_width))
    np.testing.assert_allclose(np.stack(maps)[:, ::5, ::5], arrays["sem_out_sub"], rtol=0.0, atol=1e-4)
    assert (np.stack(maps).argmax(0) == arrays["sem_out_argmax"]).mean() > 0.9999  # two logits may tie but for rounding


@pytest.mark.golden
def test_resizing_a_cut_map_is_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    (height, width), (out_height, out_width) = units["semseg_img_size"], units["semseg_out_hw"]
    maps = np.stack([resize_map(each[:height, :width], int(out_height), int(out_width)) for each in units["semseg_in"]])
    np.testing.assert_allclose(maps, units["semseg_out"], rtol=0.0, atol=1e-5)  # float32
    np.testing.assert_array_equal(maps.argmax(0), units["semseg_argmax"])
