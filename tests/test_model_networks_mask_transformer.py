"""The mask transformer has static shapes and ignores the batch; scores and boxes are as computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from model.networks.interface import normalize
from model.networks.mask_transformer import (
    MATRIX_NMS_SIGMA,
    DecoderConfig,
    DecoderOutput,
    MaskDecoder,
    MaskTransformer,
    rescore_queries,
    to_network_output,
)
from model.networks.vit import EncoderConfig, VisionTransformer

SIDE, MAP_SIDE, QUERIES, THINGS, STUFF = 56, 14, 6, 5, 3
ENCODER = EncoderConfig(embed_dim=64, depth=4, patch_px=14, grid_size=4, num_registers=0, has_layer_scale=True)
DECODER = DecoderConfig(
    side_px=SIDE,
    thing_clusters=THINGS,
    stuff_clusters=STUFF,
    num_queries=QUERIES,
    hidden_dim=64,
    num_layers=2,
    mask_dim=16,
)


@pytest.fixture(scope="module")
def network() -> MaskTransformer:
    """All weights random, large enough that images differ in their outputs."""
    generator = torch.Generator().manual_seed(1)
    network = MaskTransformer(VisionTransformer(ENCODER), MaskDecoder(DECODER, ENCODER))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return network.eval().requires_grad_(False)


def draw_pixels(batch: int, seed: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def full_sizes(pixels: Tensor) -> Tensor:
    """Sizes of images without padding."""
    return torch.tensor([pixels.shape[2:]] * len(pixels))


def predict(classes: Tensor, masks: Tensor, quality: float = 0.0) -> DecoderOutput:
    queries = classes.shape[0]
    return DecoderOutput(
        class_logits=classes[None],
        iou_logits=torch.full((1, queries), quality),
        mask_logits=masks[None],
        semantic_logits=torch.zeros(1, STUFF + 1, *masks.shape[1:]),
        aux_outputs=(),
    )


def test_normalization_maps_imagenets_mean_to_0_and_one_deviation_to_1() -> None:
    # 255 * (0.485, 0.456, 0.406), and that plus 255 * (0.229, 0.224, 0.225).
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8).reshape(1, 3, 1, 1)
    above = torch.tensor([182, 173, 161], dtype=torch.uint8).reshape(1, 3, 1, 1)
    # Pixels are whole numbers: rounding is at most 0.5 / 57 of a deviation.
    torch.testing.assert_close(normalize(mean), torch.zeros(1, 3, 1, 1), rtol=0.0, atol=0.01)
    torch.testing.assert_close(normalize(above), torch.ones(1, 3, 1, 1), rtol=0.0, atol=0.01)


def test_outputs_do_not_depend_on_the_batch(network: MaskTransformer) -> None:
    pixels = draw_pixels(4)
    together = network(pixels, full_sizes(pixels))
    assert (together.masks[0] - together.masks[1]).abs().max() > 0.01  # or the test would prove nothing
    for index in range(4):
        alone = network(pixels[index : index + 1], full_sizes(pixels)[:1])
        for name, part in alone.parts.items():
            # float32; kernels may sum in another order for another batch.
            torch.testing.assert_close(part[0], together.parts[name][index], rtol=1e-5, atol=1e-5)


def test_the_score_is_the_rescored_object_probability_times_iou() -> None:
    # Probabilities 1/8, 3/8 and, of no object, 4/8; IoU sigmoid(log 3) = 3/4; things softmax(zeros) = 1/4.
    classes = torch.log(torch.tensor([[1.0, 3.0, 4.0]]))
    raw = to_network_output(predict(classes, torch.full((1, 2, 2), 9.0), quality=torch.log(torch.tensor(3.0)).item()))
    assert raw.scores.item() == pytest.approx((0.5 * 0.75 / (STUFF + 1)) ** 0.5, abs=1e-6)  # float32
    assert raw.clusters.tolist() == [[1]]
    nothing = to_network_output(predict(torch.tensor([[-1.0, -2.0, 50.0]]), torch.full((1, 2, 2), 9.0)))
    assert (nothing.clusters.tolist(), nothing.scores.item()) == ([[0]], pytest.approx(0.0, abs=1e-6))


def test_output_boxes_are_in_input_pixels() -> None:
    masks = torch.full((1, 4, 5), -9.0)
    masks[0, 1:3, 2:5] = 9.0
    assert to_network_output(predict(torch.zeros(1, 3), masks)).boxes.tolist() == [[[8.0, 4.0, 20.0, 12.0]]]


def test_inputs_need_not_be_square(network: MaskTransformer) -> None:
    pixels = draw_pixels(1)[:, :, :28]
    output = network(pixels, full_sizes(pixels))
    assert output.masks.shape == (1, QUERIES, 7, MAP_SIDE)
    assert output.semantic.shape == (1, STUFF + 1, 7, MAP_SIDE)
    turned = network(pixels.transpose(2, 3), full_sizes(pixels))
    assert turned.semantic.shape == (1, STUFF + 1, MAP_SIDE, 7)
    assert not torch.allclose(turned.semantic.transpose(2, 3), output.semantic)  # positions differ


def test_auxiliary_outputs_have_patch_resolution_and_change_nothing(network: MaskTransformer) -> None:
    normalized = normalize(draw_pixels(2))
    features = network.encoder(normalized, network.layers)
    plain, deep = network.decoder(features, normalized), network.decoder(features, normalized, with_aux=True)
    assert plain.aux_outputs == ()
    assert [layer.mask_logits.shape for layer in deep.aux_outputs] == [(2, QUERIES, 4, 4)] * DECODER.num_layers
    assert torch.equal(plain.mask_logits, deep.mask_logits)
    assert torch.equal(deep.aux_outputs[-1].class_logits, deep.class_logits)  # the last layer is the output


def test_gradients_reach_all_decoder_weights_and_no_frozen_encoder() -> None:
    torch.manual_seed(3)
    encoder = VisionTransformer(ENCODER).requires_grad_(False)
    network = MaskTransformer(encoder, MaskDecoder(DECODER, ENCODER))
    normalized = normalize(draw_pixels(1))
    output = network.decoder(network.encoder(normalized, network.layers), normalized, with_aux=True)
    aux = [layer.mask_logits for layer in output.aux_outputs]
    parts = [output.class_logits, output.iou_logits, output.mask_logits, output.semantic_logits, *aux]
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    without_gradient = [name for name, weight in network.decoder.named_parameters() if weight.grad is None]
    assert without_gradient == []
    assert all(weight.grad is None for weight in encoder.parameters())


ROW = 10


def draw(*spans: tuple[int, int], probability: float = 1.0) -> Tensor:
    """Masks of one image of one row of ten pixels, one for each span."""
    masks = torch.zeros(1, len(spans), 1, ROW)
    for index, (first, last) in enumerate(spans):
        masks[0, index, 0, first:last] = probability
    return masks


def score(scores: list[float], masks: Tensor, things: Tensor | None = None) -> list[float]:
    everywhere = torch.ones(1, 1, ROW)
    found: list[list[float]] = rescore_queries(
        torch.tensor([scores]), masks, everywhere if things is None else things
    ).tolist()
    return found[0]


@pytest.mark.parametrize(
    ("scores", "spans", "expected"),
    [
        ([0.25], [(2, 5)], [0.5]),
        ([0.25, 1.0], [(2, 6), (2, 6)], [0.5 * math.exp(-MATRIX_NMS_SIGMA), 1.0]),
        ([1.0, 1.0], [(2, 6), (2, 6)], [1.0, math.exp(-MATRIX_NMS_SIGMA)]),
        ([0.25, 1.0], [(0, 3), (4, 8)], [0.5, 1.0]),
        ([1.0, 0.25], [(0, 0), (2, 6)], [0.0, 0.5]),
    ],
    ids=["square root", "the worse of two equal masks", "the second of two equal queries", "disjoint", "empty"],
)
def test_scores_decay_for_masks_of_better_queries(
    scores: list[float], spans: list[tuple[int, int]], expected: list[float]
) -> None:
    assert score(scores, draw(*spans)) == pytest.approx(expected, abs=1e-6)


def test_an_unstable_mask_scores_lower() -> None:
    masks = draw((0, 4))
    masks[0, 0, 0, 2:4] = 0.8  # above 0.1, below 0.9
    assert score([1.0], masks) == pytest.approx([math.sqrt(2 / 4)], abs=1e-6)


def test_a_mask_on_stuff_scores_lower() -> None:
    things = torch.zeros(1, 1, ROW)
    things[0, 0, :5] = 0.5
    assert score([1.0, 1.0], draw((3, 5), (4, 6)), things)[0] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert score([1.0], draw((7, 9)), things) == [0.0]


def test_a_rival_that_is_itself_a_duplicate_causes_less_decay() -> None:
    # IoU of the first and second 8/10, of the first and third 4/10, of the second and third 4/8.
    found = score([1.0, 0.81, 0.64], draw((0, 10), (0, 8), (4, 8)))
    covered = {(0, 1): 8 / 10, (0, 2): 4 / 10, (1, 2): 4 / 8}
    second = math.exp(-MATRIX_NMS_SIGMA * covered[0, 1] ** 2)
    third = min(
        math.exp(-MATRIX_NMS_SIGMA * covered[0, 2] ** 2),
        math.exp(-MATRIX_NMS_SIGMA * (covered[1, 2] ** 2 - covered[0, 1] ** 2)),
    )
    assert found == pytest.approx([1.0, 0.9 * second, 0.8 * third], abs=1e-6)


def test_a_nan_score_stays_nan() -> None:
    assert math.isnan(score([math.nan], draw((2, 6)))[0])
