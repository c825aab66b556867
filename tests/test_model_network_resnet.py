"""The backbone is detectron2's, stage by stage."""

from pathlib import Path

import pytest
import reference
import torch
from torch import nn

from model.network.panoptic_cascade import prepare
from model.network.resnet import ChannelNorm, FrozenBatchNorm, NormedConv, ResNet, make_norm


def test_a_frozen_norm_is_the_affine_map_that_its_statistics_say() -> None:
    norm = FrozenBatchNorm(1)
    for buffer, value in ((norm.weight, 3.0), (norm.bias, 1.0), (norm.running_mean, 5.0), (norm.running_var, 4.0)):
        buffer.fill_(value)
    # (7 - 5) / 2 * 3 + 1; the variance has 1e-5 added to it.
    assert norm.train()(torch.full((1, 1, 1, 1), 7.0)).item() == pytest.approx(4.0, abs=1e-4)
    assert list(norm.parameters()) == []


def test_a_channel_norm_knows_one_cell_alone() -> None:
    norm = ChannelNorm(2)
    norm.weight.data, norm.bias.data = torch.tensor([3.0, 5.0]), torch.tensor([0.5, 0.0])
    maps = torch.tensor([[[[1.0, 9.0]], [[5.0, 9.0]]]])  # cells (1, 5) and (9, 9)
    expected = torch.tensor([[[[-2.5, 0.5]], [[5.0, 0.0]]]])
    torch.testing.assert_close(norm(maps), expected, rtol=0.0, atol=1e-5)  # the variance, 4, has 1e-6 added to it


def test_a_convolution_has_a_bias_only_where_no_norm_has_one() -> None:
    assert NormedConv(2, 3, 1, norm="none").bias is not None
    assert NormedConv(2, 3, 1, norm="batch").bias is None
    assert isinstance(make_norm("none", 3), nn.Identity)
    assert isinstance(make_norm("layer", 3), ChannelNorm)
    assert make_norm("group", 64)(torch.ones(1, 64, 2, 2)).abs().max() == 0.0  # a constant has no deviation


def test_stages_halve_the_map_and_double_the_channels() -> None:
    network = ResNet(stem_width=4, width=2, outer=8, norm="frozen")
    shapes = [maps.shape for maps in network(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 8, 16, 24), (1, 16, 8, 12), (1, 32, 4, 6), (1, 64, 2, 3)]
    assert network.channels == (8, 16, 32, 64)


def test_the_middle_convolution_carries_the_stride() -> None:
    block = ResNet(stem_width=4, width=2, outer=8, norm="frozen").get_submodule("res3.0")
    strides = [block.get_submodule(name).stride for name in ("conv1", "conv2", "conv3", "shortcut")]
    assert strides == [(1, 1), (2, 2), (1, 1), (2, 2)]


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_channels_have_the_references_means_and_deviations(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    stages = network.get_submodule("backbone.bottom_up")(prepare(case.pixels, case.sizes))
    for level, maps in enumerate(stages, start=2):
        flat = maps[0].flatten(1)
        reference.check_near(flat.mean(1)[None], case.tensor(f"chmean_res{level}"), reference.FEATURE_NOISE)
        reference.check_near(flat.std(1)[None], case.tensor(f"chstd_res{level}"), reference.FEATURE_NOISE)
