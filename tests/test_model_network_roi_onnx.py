"""ONNX's RoIAlign on stacked levels answers as ours does on each level."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import reference
import torch
from torch import Tensor, nn

from model.network.resnet import STRIDES_PX
from model.network.roi import Sampling, pool
from model.network.roi_onnx import emit_pool

NOISE = 2e-5  # float32; the operator sums the samples in another order, and places boxes a last bit off


class Pooler(nn.Module):
    """Four levels and boxes to features in 7 x 7 bins."""

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> Tensor:
        return emit_pool((p2, p3, p4, p5), STRIDES_PX, boxes, 7, Sampling())


def run(levels: list[Tensor], boxes: Tensor) -> Tensor:
    """What ONNX Runtime makes of the exported operator."""
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
    """Smooth features of two pictures."""
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(2, 3, height // stride, width // stride, generator=generator) for stride in STRIDES_PX]


def test_boxes_of_all_sizes_are_pooled_as_in_torch() -> None:
    height, width = 256, 320
    generator = np.random.default_rng(3)
    corners = np.sort(generator.uniform(0, 1, (2, 60, 2, 2)), axis=2)  # picture, box, first and last, x and y
    sides = np.array([width, height, width, height])
    boxes = torch.from_numpy((corners.reshape(2, 60, 4) * sides).astype(np.float32))
    boxes[0, 0] = torch.tensor([0.0, 0.0, width, height])
    boxes[0, 1] = torch.tensor([width - 9.0, height - 9.0, width, height])
    boxes[0, 2] = torch.tensor([40.0, 50.0, 40.0, 90.0])  # no area
    levels = draw_levels(height, width)
    torch.testing.assert_close(run(levels, boxes), pool(levels, STRIDES_PX, boxes, 7, Sampling()), rtol=0.0, atol=NOISE)


def test_a_box_that_is_not_finite_is_read_as_nothing_and_harms_no_other() -> None:
    levels = draw_levels(64, 64)
    fine = [4.0, 5.0, 30.0, 40.0]
    boxes = torch.tensor([[[float("nan")] * 4, fine]] * 2)
    pooled = run(levels, boxes)
    assert bool(pooled.isfinite().all())
    expected = pool(levels, STRIDES_PX, torch.tensor([[fine]] * 2), 7, Sampling())
    torch.testing.assert_close(pooled[:, 1:], expected, rtol=0.0, atol=NOISE)


@pytest.mark.golden
def test_pooling_from_levels_is_the_references(golden: Path) -> None:
    units = reference.read_units(golden)
    levels = [torch.from_numpy(units[f"pooler_p{level}"]) for level in range(2, 6)]
    boxes = torch.stack([torch.from_numpy(units[f"pooler_boxes{picture}"]) for picture in (0, 1)])
    expected = torch.from_numpy(units["pooler_out7"])
    torch.testing.assert_close(run(levels, boxes).flatten(0, 1), expected, rtol=0.0, atol=NOISE)
