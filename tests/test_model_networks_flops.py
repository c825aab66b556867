"""Operations are counted as pen and paper count them, and the static graph costs what its unused places cost."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from model.networks.architecture import count_dynamic, count_flops, count_static, split_flops
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import DetectionConfig
from model.networks.rpn import ProposalConfig
from model.networks.vit import EncoderConfig

SHAPE = CascadeConfig(
    thing_clusters=3,
    stuff_clusters=2,
    stem_out_channels=8,
    bottleneck_channels=4,
    res2_out_channels=16,
    backbone_norm="frozen",
    fpn_channels=8,
    fpn_norm="none",
    box_fc_dim=16,
    mask_conv_dim=6,
    sem_seg_conv_dim=32,
)
LIMITS = CascadeInferenceConfig(
    proposals=ProposalConfig(pre_nms_topk=40, total=30, nms_iterations=4),
    detections=DetectionConfig(candidates=60, total=12, nms_iterations=6),
    sampling=RoiAlignConfig(max_cells=14),
)
HEIGHT, WIDTH = 64, 96
# Of one multiplication with its addition.
OPERATIONS = 2


def draw_inputs(batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 3, HEIGHT, WIDTH, dtype=torch.uint8), torch.tensor([[HEIGHT, WIDTH]] * batch)


class Product(nn.Module):
    """A convolution and one product of attention, on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        tokens = self.convolution(pixels.float()).flatten(2)[:, None]  # B 1 5 H*W, as five tokens
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_a_convolution_and_attention_are_counted_by_their_products() -> None:
    cells = HEIGHT * WIDTH
    assert count_flops(Product(), *draw_inputs()) == OPERATIONS * (cells * 5 * 27 + 2 * 5 * 5 * cells)


def test_the_parts_are_what_their_layers_multiply() -> None:
    flops = count_static(SHAPE, LIMITS, HEIGHT, WIDTH)
    # Anchors live on 16x24, 8x12, 4x6, 2x3 and 1x2 cells, three on each; 15 numbers a cell.
    cells = 384 + 96 + 24 + 6 + 2
    assert flops.proposals == OPERATIONS * cells * (8 * 9 * 8 + 8 * 15)
    assert flops.box_heads == OPERATIONS * 3 * 30 * (8 * 49 * 16 + 16 * 16 + 16 * (4 + 4))
    convolved = 196 * 9 * (8 * 6 + 3 * 6 * 6)
    assert flops.mask_head == OPERATIONS * 12 * (convolved + 196 * 4 * 6 * 6 + 784 * 6)
    # Steps of 3x3 from p2 to p5, at strides 4; 8; 16, 8; 32, 16, 8.
    steps = 384 * 8 + 96 * 8 + 24 * 8 + 96 * 32 + 6 * 8 + 24 * 32 + 96 * 32
    assert flops.semantic == OPERATIONS * (steps * 9 * 32 + 384 * 32 * 3)
    assert flops.suppression == OPERATIONS * (5 * 4 * 40**2 + 6 * 60**2)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_count_is_the_sum_of_the_parts_and_of_the_pictures_with_or_without_numbers(batch: int) -> None:
    network = PanopticCascade(SHAPE, LIMITS).eval()
    parts = split_flops(network, *draw_inputs(batch))
    assert parts.total == sum(asdict(parts).values()) == count_flops(network, *draw_inputs(batch))
    alone = asdict(count_static(SHAPE, LIMITS, HEIGHT, WIDTH))
    assert asdict(parts) == {part: batch * flops for part, flops in alone.items()}


def test_a_network_without_a_semantic_head_spends_nothing_on_it() -> None:
    assert count_static(replace(SHAPE, stuff_clusters=0), LIMITS, HEIGHT, WIDTH).semantic == 0


def test_a_vits_attention_counts() -> None:
    encoder = EncoderConfig(width=64, depth=2, patch_px=14, grid=4, registers=1, has_layer_scale=True)
    shape = replace(SHAPE, backbone="vit", encoder=encoder)
    blocks = [
        count_static(replace(shape, encoder=replace(encoder, depth=depth)), LIMITS, HEIGHT, WIDTH).backbone
        for depth in (2, 3)
    ]
    tokens = 4 * 6 + 2
    assert blocks[1] - blocks[0] == OPERATIONS * (tokens * 12 * 64 * 64 + 2 * tokens**2 * 64)


def test_where_shapes_follow_the_picture_only_what_is_found_counts() -> None:
    static = count_static(SHAPE, LIMITS, HEIGHT, WIDTH)
    dynamic = count_dynamic(SHAPE, HEIGHT, WIDTH, proposals=10, detections=3)
    assert (dynamic.backbone, dynamic.proposals, dynamic.semantic) == (
        static.backbone, static.proposals, static.semantic,
    )  # fmt: skip
    assert 3 * dynamic.box_heads == static.box_heads
    assert dynamic.suppression == 0
    # Of the predictor, all three clusters instead of one.
    assert dynamic.mask_head - 3 * OPERATIONS * 784 * 6 * 2 == static.mask_head / 4


@pytest.mark.slow
def test_the_papers_network_costs_little_more_than_a_dynamic_one() -> None:
    """With few detections the mask head's unused places are the difference: 1.03e9 operations each."""
    shape = CascadeConfig(thing_clusters=800)
    static = count_static(shape, CascadeInferenceConfig(), 800, 1088)
    for detections, most in ((20, 1.16), (50, 1.07), (100, 1.0)):
        dynamic = count_dynamic(shape, 800, 1088, proposals=1000, detections=detections)
        assert static.total <= most * dynamic.total
    assert static.suppression < 0.001 * static.total
