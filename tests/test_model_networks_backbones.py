"""ViT, ResNet-50 and the feature pyramids compute what plain arithmetic and detectron2 give."""

import math
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.networks.backbones import SimpleFPN
from model.networks.vit import (
    EncoderConfig,
    VisionTransformer,
    interpolate_positions,
)

SIDE = 56


def draw_shape(registers: int = 0, has_layer_scale: bool = False) -> EncoderConfig:
    return EncoderConfig(
        embed_dim=64, depth=4, patch_px=14, grid_size=4, num_registers=registers, has_layer_scale=has_layer_scale
    )


Module = TypeVar("Module", bound=nn.Module)


def draw_weights(module: Module) -> Module:
    """The module with all weights random, so that a missing term changes the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module.eval().requires_grad_(False)


def draw_images(batch: int = 2, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 sums of up to 256 products in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def norm(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight + bias


def attend(tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Attention on the tokens of one image, N C; heads of 64 channels, one after the other."""
    width = tokens.shape[1]
    query, key, value = (tokens @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).split(width, dim=1)
    mixed = []
    for first in range(0, width, 64):
        head = slice(first, first + 64)
        weights = torch.exp(query[:, head] @ key[:, head].T / math.sqrt(64))
        mixed.append(weights / weights.sum(1, keepdim=True) @ value[:, head])
    return torch.cat(mixed, dim=1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def run_block(tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
    attended = attend(norm(tokens, state["norm1.weight"], state["norm1.bias"]), state)
    tokens = tokens + attended * state.get("ls1.gamma", 1.0)
    inner = norm(tokens, state["norm2.weight"], state["norm2.bias"]) @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
    gelu = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    outer = gelu @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
    return tokens + outer * state.get("ls2.gamma", 1.0)


@pytest.mark.parametrize("registers", [0, 2])
def test_vit_tokens_are_patches_row_by_row_after_class_token_and_registers(registers: int) -> None:
    encoder = draw_weights(VisionTransformer(draw_shape(registers=registers, has_layer_scale=True)))
    image = draw_images(batch=1)
    state = encoder.state_dict()
    patches = []
    for row in range(4):
        for column in range(4):
            patch = image[0, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            patches.append(torch.einsum("cijk,ijk->c", state["patch_embed.proj.weight"], patch))
    embedded = torch.stack(patches) + state["patch_embed.proj.bias"]
    tokens = torch.cat([encoder.cls_token[0], embedded]) + encoder.pos_embed[0]
    if registers:
        tokens = torch.cat([tokens[:1], encoder.register_tokens[0], tokens[1:]])
    for block in encoder.blocks:
        tokens = run_block(tokens, block.state_dict())
    (output,) = encoder(image, (3,))
    check_close(output[0], tokens[1 + registers :])


def test_vit_outputs_of_several_layers_come_in_order_and_later_blocks_are_not_run() -> None:
    encoder = draw_weights(VisionTransformer(draw_shape()))
    image = draw_images()
    outputs = encoder(image, (0, 1, 2, 3))
    assert outputs.shape == (4, 2, 16, 64)
    for index in range(4):
        torch.testing.assert_close(encoder(image, (index,))[0], outputs[index], rtol=0.0, atol=0.0)
    torch.testing.assert_close(encoder(image, (1, 3)), outputs[[1, 3]], rtol=0.0, atol=0.0)
    encoder.get_parameter("blocks.2.norm1.weight").fill_(torch.nan)
    assert torch.equal(encoder(image, (1,))[0], outputs[1])


def test_position_embeddings_interpolate_to_a_rectangular_grid() -> None:
    rows = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 1).reshape(1, 16, 1)
    positions = torch.cat([torch.full((1, 1, 1), 9.0), rows], dim=1)
    interpolated = interpolate_positions(positions, 4, 6)
    assert interpolated[0, 0].item() == 9.0
    torch.testing.assert_close(interpolated[0, 1:, 0].reshape(4, 6), torch.arange(4.0)[:, None].expand(4, 6))


ENCODER = EncoderConfig(embed_dim=64, depth=2, patch_px=14, grid_size=4, num_registers=2, has_layer_scale=True)
WIDTH = 6


@pytest.mark.parametrize("patch_px", [8, 14, 16])
def test_simple_fpn_levels_have_the_strides_of_fpn_for_any_patch_size(patch_px: int) -> None:
    levels = draw_weights(SimpleFPN(replace(ENCODER, patch_px=patch_px), WIDTH))(draw_images(2, 96, 160))
    assert [maps.shape for maps in levels] == [
        (2, 6, 24, 40), (2, 6, 12, 20), (2, 6, 6, 10), (2, 6, 3, 5), (2, 6, 2, 3),
    ]  # fmt: skip
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


def test_simple_fpn_with_14_px_patches_encodes_the_image_resized_by_14_16() -> None:
    pyramid, encoder = draw_weights(SimpleFPN(ENCODER, WIDTH)), VisionTransformer(ENCODER)
    encoder.load_state_dict(pyramid.net.state_dict())
    image = draw_images(2, 64, 64)
    resized = functional.interpolate(image, size=(56, 56), mode="bilinear", align_corners=False)
    tokens = encoder.norm(encoder(resized, (1,))[0])  # B 16 C
    torch.testing.assert_close(pyramid.encode(image).flatten(2).transpose(1, 2), tokens, rtol=0.0, atol=0.0)


def test_simple_fpn_levels_are_the_resized_map_and_two_normalized_convolutions() -> None:
    pyramid = draw_weights(SimpleFPN(ENCODER, WIDTH))
    image = draw_images(1, 64, 96)
    maps, levels, state = pyramid.encode(image), pyramid(image), pyramid.state_dict()

    def norm(maps: Tensor, name: str) -> Tensor:
        centred = maps - maps.mean(1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)
        return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def deconvolve(maps: Tensor, name: str) -> Tensor:
        doubled = torch.einsum("bchw,cdij->bdhiwj", maps, state[f"{name}.weight"]).flatten(4).flatten(2, 3)
        return doubled + state[f"{name}.bias"][:, None, None]

    def output(maps: Tensor, stage: str, first: int) -> Tensor:
        narrow = torch.einsum("bchw,dcij->bdhw", maps, state[f"{stage}.{first}.weight"])
        narrow = norm(narrow, f"{stage}.{first}.norm")
        wide = functional.conv2d(narrow, state[f"{stage}.{first + 1}.weight"], padding=1)
        return norm(wide, f"{stage}.{first + 1}.norm")

    twice = functional.gelu(norm(deconvolve(maps, "simfp_2.0"), "simfp_2.1"))
    expected = (
        output(deconvolve(twice, "simfp_2.3"), "simfp_2", 4),
        output(deconvolve(maps, "simfp_3.0"), "simfp_3", 1),
        output(maps, "simfp_4", 0),
        output(maps.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5)), "simfp_5", 1),
    )
    for actual, wanted in zip(levels, expected, strict=False):
        # float32 sums in another order, then divided by the deviation of six channels.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
