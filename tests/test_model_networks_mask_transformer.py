"""The mask transformer is static, indifferent to its batch, and reads boxes and scores as drawn by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from model.networks.mask_transformer import (
    DecoderConfig,
    DecoderOutput,
    MaskDecoder,
    MaskTransformer,
    intermediate_layers,
    masks_to_boxes,
    normalize,
    to_network_output,
    upsample,
)
from model.networks.query_rescoring import MATRIX_NMS_SIGMA, rescore_queries
from model.networks.vit import EncoderConfig, VisionTransformer

SIDE, CELLS, QUERIES, THINGS, STUFF = 56, 14, 6, 5, 3
ENCODER = EncoderConfig(width=64, depth=4, patch_px=14, grid=4, registers=0, has_layer_scale=True)
DECODER = DecoderConfig(
    side_px=SIDE, thing_clusters=THINGS, stuff_clusters=STUFF, queries=QUERIES, width=64, layers=2, mask_dim=16
)


@pytest.fixture(scope="module")
def network() -> MaskTransformer:
    """Every weight random, large enough that pictures differ in their answers."""
    generator = torch.Generator().manual_seed(1)
    network = MaskTransformer(VisionTransformer(ENCODER), MaskDecoder(DECODER, ENCODER))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return network.eval().requires_grad_(False)


def draw_pixels(batch: int, seed: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def fill(pixels: Tensor) -> Tensor:
    """The sizes of pictures that fill their pixels."""
    return torch.tensor([pixels.shape[2:]] * len(pixels))


def predict(classes: Tensor, masks: Tensor, quality: float = 0.0) -> DecoderOutput:
    queries = classes.shape[0]
    return DecoderOutput(
        classes=classes[None],
        quality=torch.full((1, queries), quality),
        masks=masks[None],
        semantic=torch.zeros(1, STUFF + 1, *masks.shape[1:]),
        layers=(),
    )


def test_normalising_takes_imagenets_mean_to_zero_and_one_deviation_to_one() -> None:
    # 255 * (0.485, 0.456, 0.406), and the same one deviation of 255 * (0.229, 0.224, 0.225) up.
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8).reshape(1, 3, 1, 1)
    above = torch.tensor([182, 173, 161], dtype=torch.uint8).reshape(1, 3, 1, 1)
    # Pixels are whole numbers: half of one is 0.5 / 57 of a deviation.
    torch.testing.assert_close(normalize(mean), torch.zeros(1, 3, 1, 1), rtol=0.0, atol=0.01)
    torch.testing.assert_close(normalize(above), torch.ones(1, 3, 1, 1), rtol=0.0, atol=0.01)


@pytest.mark.parametrize(
    ("depth", "taps"), [(4, (0, 1, 2, 3)), (8, (1, 3, 5, 7)), (12, (2, 5, 8, 11)), (24, (5, 11, 17, 23))]
)
def test_taps_are_the_last_blocks_of_the_quarters(depth: int, taps: tuple[int, ...]) -> None:
    assert intermediate_layers(depth) == taps


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_depend_on_the_network_and_not_on_the_picture(network: MaskTransformer, batch: int) -> None:
    for pixels in (draw_pixels(batch), torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)):
        raw = network(pixels, fill(pixels))
        assert raw.scores.shape == raw.clusters.shape == (batch, QUERIES)
        assert raw.boxes.shape == (batch, QUERIES, 4)
        assert raw.masks.shape == (batch, QUERIES, CELLS, CELLS)
        assert raw.semantic.shape == (batch, STUFF + 1, CELLS, CELLS)


def test_a_picture_alone_and_in_a_batch_gets_the_same_answer(network: MaskTransformer) -> None:
    pixels = draw_pixels(4)
    together = network(pixels, fill(pixels))
    assert (together.masks[0] - together.masks[1]).abs().max() > 0.01  # else equality would say nothing
    for index in range(4):
        for alone, among in zip(network(pixels[index : index + 1], fill(pixels)[:1]), together, strict=True):
            # float32; kernels may sum in another order for another batch.
            torch.testing.assert_close(alone[0], among[index], rtol=1e-5, atol=1e-5)


def test_the_order_of_a_batch_is_the_order_of_its_answers(network: MaskTransformer) -> None:
    pixels = draw_pixels(3)
    forth, back = network(pixels, fill(pixels)), network(pixels.flip(0), fill(pixels))
    for first, second in zip(forth, back, strict=True):
        torch.testing.assert_close(first, second.flip(0), rtol=1e-5, atol=1e-5)  # float32


def test_scores_and_masks_are_probabilities_and_clusters_exist(network: MaskTransformer) -> None:
    raw = network(draw_pixels(3), fill(draw_pixels(3)))
    for chances in (raw.scores, raw.masks):
        assert chances.min() >= 0.0
        assert chances.max() <= 1.0
    assert raw.clusters.min() >= 0
    assert raw.clusters.max() < THINGS
    assert raw.clusters.dtype == torch.int64


def test_the_score_is_the_ranked_chance_of_an_object_times_its_quality() -> None:
    # Chances 1/8, 3/8 and, of no object, 4/8; quality sigmoid(log 3) = 3/4; chance of things softmax(zeros) = 1/3.
    classes = torch.log(torch.tensor([[1.0, 3.0, 4.0]]))
    raw = to_network_output(predict(classes, torch.full((1, 2, 2), 9.0), quality=torch.log(torch.tensor(3.0)).item()))
    assert raw.scores.item() == pytest.approx((0.5 * 0.75 / (STUFF + 1)) ** 0.5, abs=1e-6)  # float32
    assert raw.clusters.tolist() == [[1]]


def test_no_object_is_never_named_as_a_cluster() -> None:
    raw = to_network_output(predict(torch.tensor([[-1.0, -2.0, 50.0]]), torch.full((1, 2, 2), 9.0)))
    assert raw.clusters.tolist() == [[0]]
    assert raw.scores.item() == pytest.approx(0.0, abs=1e-6)  # float32


def test_boxes_of_a_raw_answer_are_in_input_pixels() -> None:
    masks = torch.full((1, 4, 5), -9.0)
    masks[0, 1:3, 2:5] = 9.0
    assert to_network_output(predict(torch.zeros(1, 3), masks)).boxes.tolist() == [[[8.0, 4.0, 20.0, 12.0]]]


def test_bounds_of_masks_drawn_by_hand() -> None:
    masks = torch.zeros(1, 5, 4, 6, dtype=torch.bool)
    masks[0, 0, 1, 2] = True
    masks[0, 1] = True
    masks[0, 2, 0, 5] = masks[0, 2, 3, 1] = True
    masks[0, 4, 3, :2] = True
    assert masks_to_boxes(masks)[0].tolist() == [
        [2, 1, 3, 2],  # a cell
        [0, 0, 6, 4],  # everything
        [1, 0, 6, 4],  # two cells far apart
        [0, 0, 0, 0],  # nothing
        [0, 3, 2, 4],  # the last row
    ]


def test_bounds_do_not_mix_pictures() -> None:
    masks = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    masks[1, 0, 2, 2] = True
    assert masks_to_boxes(masks).tolist() == [[[0, 0, 0, 0]], [[2, 2, 3, 3]]]


def test_enlarging_keeps_the_cells_centres_in_place() -> None:
    row = upsample(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), 4)[0, 0, 0]
    assert row.tolist() == [0.0, 0.25, 0.75, 1.0]


def test_deep_layers_are_read_at_patch_resolution_and_change_no_answer(network: MaskTransformer) -> None:
    normalised = normalize(draw_pixels(2))
    features = network.encoder(normalised, network.taps)
    plain, deep = network.decoder(features, normalised), network.decoder(features, normalised, with_aux=True)
    assert plain.layers == ()
    assert [layer.masks.shape for layer in deep.layers] == [(2, QUERIES, 4, 4)] * DECODER.layers
    assert torch.equal(plain.masks, deep.masks)
    assert torch.equal(deep.layers[-1].classes, deep.classes)  # the last layer's word is the answer


def test_the_mask_of_a_query_is_bright_where_its_pixels_are(network: MaskTransformer) -> None:
    """The picture reaches the masks: a change in one corner moves the masks there most."""
    dark = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    lit = dark.clone()
    lit[..., :8, :8] = 255
    change = (network(lit, fill(lit)).masks - network(dark, fill(dark)).masks).abs()[0].mean(0)
    assert change[:2, :2].mean() > 2.0 * change[7:, 7:].mean()


def test_gradients_reach_every_weight_of_the_decoder_and_none_of_a_frozen_encoder() -> None:
    torch.manual_seed(3)
    encoder = VisionTransformer(ENCODER).requires_grad_(False)
    network = MaskTransformer(encoder, MaskDecoder(DECODER, ENCODER))
    normalised = normalize(draw_pixels(1))
    answer = network.decoder(network.encoder(normalised, network.taps), normalised, with_aux=True)
    parts = [answer.classes, answer.quality, answer.masks, answer.semantic, *(layer.masks for layer in answer.layers)]
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    silent = [name for name, weight in network.decoder.named_parameters() if weight.grad is None]
    assert silent == []
    assert all(weight.grad is None for weight in encoder.parameters())


def make_decoder(**changes: int) -> MaskDecoder:
    torch.manual_seed(4)
    return MaskDecoder(replace(DECODER, **changes), ENCODER).eval().requires_grad_(False)


def test_a_head_for_embeddings_changes_no_other_weight_and_no_answer() -> None:
    plain, embedding = make_decoder(), make_decoder(embedding=8)
    assert all(torch.equal(weight, embedding.state_dict()[name]) for name, weight in plain.state_dict().items())
    features, normalised = torch.randn(4, 2, 16, 64), normalize(draw_pixels(2))
    with_head = embedding(features, normalised)
    assert with_head.embeddings.shape == (2, QUERIES, 8)
    assert torch.equal(plain(features, normalised).classes, with_head.classes)
    assert plain(features, normalised).embeddings is None


def test_clusters_made_later_keep_every_score_and_are_the_nearest() -> None:
    taught = make_decoder(embedding=8)
    made = make_decoder(embedding=8, trained_clusters=THINGS, thing_clusters=7)
    made.load_state_dict(taught.state_dict(), strict=False)
    features, normalised = torch.randn(4, 2, 16, 64), normalize(draw_pixels(2))
    before, after = taught(features, normalised), made(features, normalised)
    assert after.classes.shape == (2, QUERIES, 8)
    torch.testing.assert_close(to_network_output(after).scores, to_network_output(before).scores)
    head = made.cluster_head
    assert head is not None
    head.weight[:], head.bias[:] = 0.0, torch.arange(7.0)
    assert (to_network_output(made(features, normalised)).clusters == 6).all()


def test_clusters_cannot_be_made_later_without_embeddings() -> None:
    with pytest.raises(ConfigError, match="embeddings"):
        replace(DECODER, trained_clusters=5)


ROW = 10


def draw(*spans: tuple[int, int], sure: float = 1.0) -> Tensor:
    """One picture of one row of ten cells, a mask for each span."""
    masks = torch.zeros(1, len(spans), 1, ROW)
    for place, (first, last) in enumerate(spans):
        masks[0, place, 0, first:last] = sure
    return masks


def score(chances: list[float], masks: Tensor, things: Tensor | None = None) -> list[float]:
    everywhere = torch.ones(1, 1, ROW)
    found: list[list[float]] = rescore_queries(
        torch.tensor([chances]), masks, everywhere if things is None else things
    ).tolist()
    return found[0]


def test_the_score_of_a_sure_mask_on_things_is_the_root_of_its_chance() -> None:
    assert score([0.25], draw((2, 5))) == pytest.approx([0.5], abs=1e-6)


def test_a_mask_that_shrinks_between_the_cuts_counts_by_what_stays() -> None:
    masks = draw((0, 4))
    masks[0, 0, 0, 2:4] = 0.8  # above 0.1, below 0.9
    assert score([1.0], masks) == pytest.approx([math.sqrt(2 / 4)], abs=1e-6)


def test_an_object_on_what_the_semantic_head_calls_stuff_counts_by_the_chance_of_things_inside() -> None:
    things = torch.zeros(1, 1, ROW)
    things[0, 0, :5] = 0.5
    assert score([1.0, 1.0], draw((3, 5), (4, 6)), things)[0] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert score([1.0], draw((7, 9)), things) == [0.0]


def test_the_worse_of_two_equal_masks_decays_and_the_better_does_not() -> None:
    found = score([0.25, 1.0], draw((2, 6), (2, 6)))
    assert found == pytest.approx([0.5 * math.exp(-MATRIX_NMS_SIGMA), 1.0], abs=1e-6)


def test_of_two_alike_in_everything_the_first_stays() -> None:
    assert score([1.0, 1.0], draw((2, 6), (2, 6))) == pytest.approx([1.0, math.exp(-MATRIX_NMS_SIGMA)], abs=1e-6)


def test_masks_apart_leave_each_other_alone() -> None:
    assert score([0.25, 1.0], draw((0, 3), (4, 8))) == pytest.approx([0.5, 1.0], abs=1e-6)


def test_a_rival_that_is_itself_a_duplicate_takes_less_away() -> None:
    # IoU of the first and second 8/10, of the first and third 4/10, of the second and third 4/8.
    found = score([1.0, 0.81, 0.64], draw((0, 10), (0, 8), (4, 8)))
    covered = {(0, 1): 8 / 10, (0, 2): 4 / 10, (1, 2): 4 / 8}
    second = math.exp(-MATRIX_NMS_SIGMA * covered[0, 1] ** 2)
    third = min(
        math.exp(-MATRIX_NMS_SIGMA * covered[0, 2] ** 2),
        math.exp(-MATRIX_NMS_SIGMA * (covered[1, 2] ** 2 - covered[0, 1] ** 2)),
    )
    assert found == pytest.approx([1.0, 0.9 * second, 0.8 * third], abs=1e-6)


def test_a_query_that_draws_nothing_scores_nothing_and_disturbs_nobody() -> None:
    assert score([1.0, 0.25], draw((0, 0), (2, 6))) == pytest.approx([0.0, 0.5], abs=1e-6)


def test_what_is_no_number_stays_none() -> None:
    assert math.isnan(score([math.nan], draw((2, 6)))[0])


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    masks = torch.cat([draw((2, 6), (2, 6)), draw((0, 2), (4, 8))])
    found = rescore_queries(torch.ones(2, 2), masks, torch.ones(2, 1, ROW))
    assert found.flatten().tolist() == pytest.approx([1.0, math.exp(-MATRIX_NMS_SIGMA), 1.0, 1.0], abs=1e-6)
