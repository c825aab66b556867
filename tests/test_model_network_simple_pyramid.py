"""The pyramid over a ViT has the strides of the other one, at any size of the picture."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.network.simple_pyramid import SimplePyramid
from model.network.vit import EncoderShape, VisionTransformer

ENCODER = EncoderShape(width=64, depth=2, patch_px=14, grid=4, registers=2, has_layer_scale=True)
WIDTH = 6


def draw_pyramid(shape: EncoderShape = ENCODER) -> SimplePyramid:
    """Every weight random, so that no term can be forgotten unseen."""
    generator = torch.Generator().manual_seed(1)
    pyramid = SimplePyramid(shape, WIDTH)
    for parameter in pyramid.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return pyramid.eval().requires_grad_(False)


def draw_picture(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("patch_px", [8, 14, 16])
def test_levels_have_one_width_and_the_strides_of_the_heads(patch_px: int) -> None:
    levels = draw_pyramid(replace(ENCODER, patch_px=patch_px))(draw_picture(2, 96, 160))
    assert [maps.shape for maps in levels] == [
        (2, 6, 24, 40), (2, 6, 12, 20), (2, 6, 6, 10), (2, 6, 3, 5), (2, 6, 2, 3),
    ]  # fmt: skip
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


def test_at_the_stored_grid_the_map_is_the_encoders_own_seen_at_14_to_16() -> None:
    pyramid, encoder = draw_pyramid(), VisionTransformer(ENCODER)
    encoder.load_state_dict(pyramid.net.state_dict())
    picture = draw_picture(2, 64, 64)
    seen = functional.interpolate(picture, size=(56, 56), mode="bilinear", align_corners=False)
    tokens = encoder.norm(encoder(seen, (1,))[0])  # B 16 C
    torch.testing.assert_close(pyramid.encode(picture).flatten(2).transpose(1, 2), tokens, rtol=0.0, atol=0.0)


def test_patches_of_16_px_see_the_picture_as_it_is() -> None:
    shape = replace(ENCODER, patch_px=16)
    pyramid, encoder = draw_pyramid(shape), VisionTransformer(shape)
    encoder.load_state_dict(pyramid.net.state_dict())
    picture = draw_picture(1, 64, 64)
    tokens = encoder.norm(encoder(picture, (1,))[0])
    torch.testing.assert_close(pyramid.encode(picture).flatten(2).transpose(1, 2), tokens, rtol=0.0, atol=0.0)


def test_each_level_is_the_map_enlarged_or_shrunk_then_two_normed_convolutions() -> None:
    pyramid = draw_pyramid()
    picture = draw_picture(1, 64, 96)
    maps, levels, state = pyramid.encode(picture), pyramid(picture), pyramid.state_dict()

    def norm(cells: Tensor, name: str) -> Tensor:
        centred = cells - cells.mean(1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)
        return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def enlarge(cells: Tensor, name: str) -> Tensor:
        taps = torch.einsum("bchw,cdij->bdhiwj", cells, state[f"{name}.weight"]).flatten(4).flatten(2, 3)
        return taps + state[f"{name}.bias"][:, None, None]

    def put_out(cells: Tensor, stage: str, first: int) -> Tensor:
        narrow = torch.einsum("bchw,dcij->bdhw", cells, state[f"{stage}.{first}.weight"])
        narrow = norm(narrow, f"{stage}.{first}.norm")
        wide = functional.conv2d(narrow, state[f"{stage}.{first + 1}.weight"], padding=1)
        return norm(wide, f"{stage}.{first + 1}.norm")

    twice = functional.gelu(norm(enlarge(maps, "simfp_2.0"), "simfp_2.1"))
    expected = (
        put_out(enlarge(twice, "simfp_2.3"), "simfp_2", 4),
        put_out(enlarge(maps, "simfp_3.0"), "simfp_3", 1),
        put_out(maps, "simfp_4", 0),
        put_out(maps.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5)), "simfp_5", 1),
    )
    for actual, wanted in zip(levels, expected, strict=False):
        # float32 sums in another order, then divided by the deviation of six channels.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_every_patch_reaches_every_level_at_its_place() -> None:
    """Without attention a change in one patch stays near it."""
    pyramid = draw_pyramid()
    for block in pyramid.net.blocks:
        block.get_parameter("ls1.gamma").zero_()
    picture = draw_picture(1, 96, 128)
    other = picture.clone()
    other[:, :, 36:44, 68:76] += 1.0  # inside row 2, column 4 of patches of 16 px, away from its border
    changed = [(one - two).abs().sum((0, 1)) > 0 for one, two in zip(pyramid(picture), pyramid(other), strict=True)]
    for maps, stride in zip(changed, (4, 8, 16, 32), strict=False):
        rows, columns = maps.any(1).nonzero(), maps.any(0).nonzero()
        # The 3x3 convolution spreads it by a cell; a cell of stride 32 covers two patches.
        assert rows.min() == 32 // stride - 1
        assert rows.max() == max(48 // stride, 32 // stride + 1)
        assert columns.min() == 64 // stride - 1
        assert columns.max() == max(80 // stride, 64 // stride + 1)


def test_a_picture_alone_and_in_a_batch_gets_the_same_maps() -> None:
    pyramid, pictures = draw_pyramid(), draw_picture(3, 64, 96)
    together = pyramid(pictures)
    for index in range(3):
        for alone, each in zip(pyramid(pictures[index : index + 1]), together, strict=True):
            # float32; kernels may sum in another order for another batch.
            torch.testing.assert_close(alone[0], each[index], rtol=1e-4, atol=1e-4)
