"""The vision transformer computes what plain arithmetic says, and its positions resize as the originals do."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.network.vit import EncoderShape, VisionTransformer, infer_encoder, resize_positions, stretch_positions

SIDE = 56


def draw_shape(registers: int = 0, has_layer_scale: bool = False, depth: int = 4, width: int = 64) -> EncoderShape:
    return EncoderShape(
        width=width, depth=depth, patch_px=14, grid=4, registers=registers, has_layer_scale=has_layer_scale
    )


def draw_encoder(shape: EncoderShape, seed: int = 1) -> VisionTransformer:
    """Every weight random, so that no term can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    encoder = VisionTransformer(shape)
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return encoder.eval().requires_grad_(False)


def draw_picture(batch: int = 2, seed: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for float32 sums of up to 256 products in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def norm(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight + bias


def attend(tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
    """One picture's tokens, N C; heads of 64 channels, one after the other."""
    width = tokens.shape[1]
    query, key, value = (tokens @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).split(width, dim=1)
    mixed = []
    for first in range(0, width, 64):
        head = slice(first, first + 64)
        chances = torch.exp(query[:, head] @ key[:, head].T / math.sqrt(64))
        mixed.append(chances / chances.sum(1, keepdim=True) @ value[:, head])
    return torch.cat(mixed, dim=1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def run_block(tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
    attended = attend(norm(tokens, state["norm1.weight"], state["norm1.bias"]), state)
    tokens = tokens + attended * state.get("ls1.gamma", 1.0)
    inner = norm(tokens, state["norm2.weight"], state["norm2.bias"]) @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
    gelu = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    outer = gelu @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
    return tokens + outer * state.get("ls2.gamma", 1.0)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("has_layer_scale", [False, True])
def test_a_block_is_attention_and_a_perceptron_on_normed_tokens(width: int, has_layer_scale: bool) -> None:
    block = draw_encoder(draw_shape(width=width, has_layer_scale=has_layer_scale)).blocks[0]
    tokens = torch.randn(2, 17, width, generator=torch.Generator().manual_seed(4))
    expected = torch.stack([run_block(one, block.state_dict()) for one in tokens])
    check_close(block(tokens), expected)


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_are_patches_row_by_row_after_a_class_token_and_registers(registers: int) -> None:
    encoder = draw_encoder(draw_shape(registers=registers, has_layer_scale=True))
    picture = draw_picture(batch=1)
    state = encoder.state_dict()
    patches = []
    for row in range(4):
        for column in range(4):
            patch = picture[0, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            patches.append(torch.einsum("cijk,ijk->c", state["patch_embed.proj.weight"], patch))
    embedded = torch.stack(patches) + state["patch_embed.proj.bias"]
    tokens = torch.cat([encoder.cls_token[0], embedded]) + encoder.pos_embed[0]
    if registers:
        tokens = torch.cat([tokens[:1], encoder.register_tokens[0], tokens[1:]])
    for block in encoder.blocks:
        tokens = run_block(tokens, block.state_dict())
    (answer,) = encoder(picture, (3,))
    check_close(answer[0], tokens[1 + registers :])


def test_taps_come_in_the_order_of_the_blocks() -> None:
    encoder = draw_encoder(draw_shape())
    picture = draw_picture()
    tapped = encoder(picture, (0, 1, 2, 3))
    assert tapped.shape == (4, 2, 16, 64)
    for index in range(4):
        torch.testing.assert_close(encoder(picture, (index,))[0], tapped[index], rtol=0.0, atol=0.0)
    torch.testing.assert_close(encoder(picture, (1, 3)), tapped[[1, 3]], rtol=0.0, atol=0.0)


def test_blocks_after_the_last_tap_are_not_run() -> None:
    encoder = draw_encoder(draw_shape())
    expected = encoder(draw_picture(), (1,))
    encoder.get_parameter("blocks.2.norm1.weight").fill_(torch.nan)
    assert torch.equal(encoder(draw_picture(), (1,)), expected)


def test_a_picture_alone_and_in_a_batch_gives_the_same_tokens() -> None:
    encoder = draw_encoder(draw_shape(registers=2, has_layer_scale=True))
    pictures = draw_picture(batch=3)
    together = encoder(pictures, (0, 3))
    for index in range(3):
        check_close(encoder(pictures[index : index + 1], (0, 3))[:, 0], together[:, index])


def test_a_position_grid_of_the_wanted_size_is_returned_as_it_is() -> None:
    positions = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(5))
    assert resize_positions(positions, 4) is positions


def test_positions_stretched_to_their_own_size_are_the_stored_ones() -> None:
    positions = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(stretch_positions(positions, 4, 4), positions, rtol=0.0, atol=0.0)


def test_positions_stretch_to_rows_and_columns_each_by_its_own_factor() -> None:
    rows = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 1).reshape(1, 16, 1)
    positions = torch.cat([torch.full((1, 1, 1), 9.0), rows], dim=1)
    stretched = stretch_positions(positions, 4, 6)
    assert stretched[0, 0].item() == 9.0
    torch.testing.assert_close(stretched[0, 1:, 0].reshape(4, 6), torch.arange(4.0)[:, None].expand(4, 6))


@pytest.mark.parametrize(
    "shape", [draw_shape(), draw_shape(registers=2, has_layer_scale=True), draw_shape(depth=2, width=128)]
)
def test_an_encoders_own_weights_tell_its_shape(shape: EncoderShape) -> None:
    assert infer_encoder(VisionTransformer(shape).state_dict()) == shape


def test_positions_that_are_no_square_tell_no_shape() -> None:
    state = VisionTransformer(draw_shape()).state_dict()
    with pytest.raises(ValueError, match="16 positions"):
        infer_encoder({**state, "pos_embed": torch.zeros(1, 16, 64)})


def test_resized_positions_keep_the_class_token_and_a_constant() -> None:
    positions = torch.full((1, 17, 3), 0.25)
    positions[0, 0] = 7.0
    resized = resize_positions(positions, 7)
    assert resized.shape == (1, 50, 3)
    assert resized[0, 0].tolist() == [7.0] * 3
    torch.testing.assert_close(resized[0, 1:], torch.full((49, 3), 0.25))


def test_resized_positions_stay_row_by_row() -> None:
    rows = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 1).reshape(1, 16, 1)
    positions = torch.cat([torch.zeros(1, 1, 1), rows], dim=1)
    square = resize_positions(positions, 8)[0, 1:, 0].reshape(8, 8)
    assert (square - square[:, :1]).abs().max() < 1e-6
    assert square[:, 0].diff().min() > 0.0
    # The middle of the rows, between 1 and 2, stays the middle: bicubic kernels are symmetric.
    assert square[3:5, 0].mean().item() == pytest.approx(1.5, abs=1e-6)


def test_positions_are_resized_with_the_bicubic_kernel() -> None:
    square = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(6))
    positions = torch.cat([torch.zeros(1, 1, 2), square.flatten(2).transpose(1, 2)], dim=1)
    expected = functional.interpolate(square, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_positions(positions, 4)[:, 1:], expected.flatten(2).transpose(1, 2))
