"""The pyramid is detectron2's, level by level."""

from pathlib import Path

import pytest
import reference
import torch

from model.network.panoptic_cascade import prepare
from model.network.pyramid import Pyramid
from model.network.resnet import ResNet


def draw_pyramid() -> Pyramid:
    torch.manual_seed(1)
    return Pyramid(ResNet(stem_width=4, width=2, outer=8, norm="frozen"), 6, "none").eval().requires_grad_(False)


def test_levels_have_one_width_and_halve_five_times() -> None:
    levels = draw_pyramid()(torch.zeros(2, 3, 96, 160))
    assert [maps.shape for maps in levels] == [
        (2, 6, 24, 40), (2, 6, 12, 20), (2, 6, 6, 10), (2, 6, 3, 5), (2, 6, 2, 3),
    ]  # fmt: skip


def test_the_last_level_is_every_second_cell_of_the_one_below() -> None:
    levels = draw_pyramid()(torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


def test_what_only_the_top_sees_reaches_the_bottom() -> None:
    pyramid = draw_pyramid()
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    before = pyramid(picture)
    pyramid.get_parameter("fpn_lateral5.bias").add_(1.0)
    after = pyramid(picture)
    assert all((new != old).any() for new, old in zip(after, before, strict=True))


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_levels_are_the_references(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    for actual, expected in zip(network.backbone(prepare(case.pixels, case.sizes)), case.levels, strict=True):
        reference.check_near(actual, expected, reference.FEATURE_NOISE)
