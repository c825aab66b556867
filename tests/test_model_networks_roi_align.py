"""RoIAlign averages as computed by hand, as in detectron2, and equally in ONNX."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import reference
import torch
from torch import Tensor, nn

from model.networks.backbones import STAGE_STRIDES_PX
from model.networks.roi_align import (
    RoiAlignConfig,
    roi_align,
    roi_align_onnx,
)

STRIDES_PX = (4, 8, 16, 32)
LONG = RoiAlignConfig(max_box_side=700)
"""Large enough for the reference's box of 76 x 50 pixels on a single level."""
NOISE = 1e-5
"""float32 rounding of features up to 3, at most 64 of them in a bin."""


def draw_ramp(height: int = 16, width: int = 24) -> Tensor:
    """Channel 0 holds the column, channel 1 the row."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([columns, rows])[None]


def pool_one(maps: Tensor, box: list[float], side: int = 2, config: RoiAlignConfig = LONG) -> Tensor:
    """A box's features on a map at stride 4."""
    return roi_align([maps], [4], torch.tensor([[box]]), side, config)[0, 0]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_long_thin_box_is_sampled_once_per_pixel(is_transposed: bool) -> None:
    waves = torch.sin(torch.arange(300.0))  # a coarser average would be far off
    maps = waves.expand(1, 1, 4, 300)
    box = [4.0, 6.0, 1124.0, 14.0]  # 0.5 to 280.5 across: 40 samples a bin, at whole pixels
    if is_transposed:
        maps, box = maps.transpose(2, 3), [box[1], box[0], box[3], box[2]]
    pooled = roi_align([maps], [4], torch.tensor([[box]]), 7, RoiAlignConfig())[0, 0, 0]
    pooled = pooled.T if is_transposed else pooled
    expected = waves[1:281].reshape(7, 40).mean(1)
    torch.testing.assert_close(pooled[0], expected, rtol=0.0, atol=NOISE)


@pytest.mark.parametrize("box", [[8.0, 8.0, 8.0, 24.0], [8.0, 8.0, 24.0, 8.0], [8.0, 8.0, 8.0, 8.0]])
def test_an_empty_box_has_zero_features(box: list[float]) -> None:
    assert pool_one(torch.ones(1, 1, 16, 24), box).abs().max() == 0.0


def test_the_border_of_a_level_does_not_read_another_level() -> None:
    levels = [torch.full((1, 1, 64 // stride, 64 // stride), float(stride)) for stride in STRIDES_PX]
    boxes = torch.tensor([[[40.0, 40.0, 64.0, 64.0], [0.0, 0.0, 24.0, 24.0]]])
    torch.testing.assert_close(roi_align(levels, STRIDES_PX, boxes, 7, LONG), torch.full((1, 2, 1, 7, 7), 4.0))


def test_a_box_that_is_not_finite_does_not_affect_others() -> None:
    fine = [8.0, 16.0, 24.0, 48.0]
    boxes = torch.tensor([[[float("nan")] * 4, fine, [0.0, 0.0, float("inf"), 9.0], [-1e30, 0.0, 1e30, 9.0]]])
    pooled = roi_align([draw_ramp()], [4], boxes, 2, LONG)
    assert pooled[0, 1].equal(pool_one(draw_ramp(), fine))


def test_gradients_reach_only_the_pixels_of_the_box() -> None:
    maps = torch.zeros(1, 1, 16, 24, requires_grad=True)
    pool_one(maps, [8.0, 16.0, 24.0, 32.0]).sum().backward()
    assert maps.grad is not None
    assert maps.grad.sum().item() == pytest.approx(4.0, abs=1e-4)  # four averages, float32
    assert maps.grad[0, 0, 9:].abs().max() == 0.0
    assert maps.grad[0, 0, :, 7:].abs().max() == 0.0


def test_half_precision_maps_are_pooled_at_full_precision_coordinates() -> None:
    ramp = draw_ramp(64, 64)
    box = [101.0, 33.0, 130.0, 47.0]
    pooled = pool_one(ramp.bfloat16(), box)
    assert pooled.dtype == torch.bfloat16
    # Whole numbers below 256 are exact in bfloat16; the result is rounded to eight bits.
    torch.testing.assert_close(pooled.float(), pool_one(ramp, box), rtol=2**-8, atol=0.0)


@pytest.mark.golden
@pytest.mark.parametrize("side", [7, 14])
def test_pooling_equals_detectron2s(golden: Path, side: int) -> None:
    units = reference.read_units(golden)
    features, rois = torch.from_numpy(units["roialign_features"]), torch.from_numpy(units["roialign_rois"])
    expected = torch.from_numpy(units[f"roialign_out{side}"])
    for image in (0, 1):
        is_here = rois[:, 0] == image
        pooled = roi_align([features[[image]]], [4], rois[is_here, 1:][None], side, LONG)
        torch.testing.assert_close(pooled[0], expected[is_here], rtol=0.0, atol=NOISE)


ONNX_NOISE = 2e-5  # float32: the operator sums in another order and rounds coordinates differently


class Pooler(nn.Module):
    """The ONNX operator on four levels, in 7 x 7 bins."""

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> Tensor:
        return roi_align_onnx((p2, p3, p4, p5), STAGE_STRIDES_PX, boxes, 7)


def run(levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Run the exported operator in ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Pooler(), (*levels, boxes), dynamo=True, verbose=False, opset_version=18,
            input_names=["p2", "p3", "p4", "p5", "boxes"], output_names=["pooled"],
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    inputs = zip(("p2", "p3", "p4", "p5", "boxes"), (*levels, boxes), strict=True)
    (pooled,) = session.run(["pooled"], {name: tensor.numpy() for name, tensor in inputs})
    return torch.from_numpy(pooled)


def draw_levels(height: int, width: int) -> list[Tensor]:
    """Random features of two images."""
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(2, 3, height // stride, width // stride, generator=generator) for stride in STAGE_STRIDES_PX]


def test_the_onnx_operator_pools_as_torch_does() -> None:
    height, width = 256, 320
    generator = np.random.default_rng(3)
    corners = np.sort(generator.uniform(0, 1, (2, 60, 2, 2)), axis=2)  # image, box, first and last, x and y
    sides = np.array([width, height, width, height])
    boxes = torch.from_numpy((corners.reshape(2, 60, 4) * sides).astype(np.float32))
    boxes[0, 0] = torch.tensor([0.0, 0.0, width, height])
    boxes[0, 1] = torch.tensor([width - 9.0, height - 9.0, width, height])
    boxes[0, 2] = torch.tensor([40.0, 50.0, 40.0, 90.0])  # no area
    levels = draw_levels(height, width)
    torch.testing.assert_close(
        run(levels, boxes), roi_align(levels, STAGE_STRIDES_PX, boxes, 7, RoiAlignConfig()), rtol=0.0, atol=ONNX_NOISE
    )


def test_a_nan_box_in_onnx_does_not_affect_others() -> None:
    levels = draw_levels(64, 64)
    fine = [4.0, 5.0, 30.0, 40.0]
    boxes = torch.tensor([[[float("nan")] * 4, fine]] * 2)
    pooled = run(levels, boxes)
    assert bool(pooled.isfinite().all())
    expected = roi_align(levels, STAGE_STRIDES_PX, torch.tensor([[fine]] * 2), 7, RoiAlignConfig())
    torch.testing.assert_close(pooled[:, 1:], expected, rtol=0.0, atol=ONNX_NOISE)
