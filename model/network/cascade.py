"""The cascade of box heads and the mask head: proposals to classes, better boxes and masks."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.network.boxes import clip, decode
from model.network.resnet import STRIDES_PX
from model.network.roi import Sampling, pool

STAGE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Of the box deltas; each stage speaks in finer units."""
BOX_SIDE = 7
MASK_SIDE = 28
"""Cells of a mask; the features below have half as many."""

Levels = tuple[Float[Tensor, "B C h w"], ...]


class StageOutput(NamedTuple):
    """What one stage says about the boxes it was given."""

    logits: Float[Tensor, "B N K+1"]
    """The last class is "none"."""
    deltas: Float[Tensor, "B N 4"]
    """The same for every class."""
    boxes: Float[Tensor, "B N 4"]
    """Moved by the deltas; may leave the picture."""


class BoxHead(nn.Module):
    """Two fully connected layers."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inner * BOX_SIDE**2, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, pooled: Float[Tensor, "B N C 7 7"]) -> Float[Tensor, "B N D"]:
        return functional.relu(self.fc2(functional.relu(self.fc1(pooled.flatten(2)))))


class BoxPredictor(nn.Module):
    def __init__(self, width: int, clusters: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, clusters + 1)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, hidden: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N K+1"], Float[Tensor, "B N 4"]]:
        return self.cls_score(hidden), self.bbox_pred(hidden)


class MaskHead(nn.Module):
    """Four convolutions, a doubling, and one mask for each cluster or, with one channel, for all of them."""

    def __init__(self, inner: int, width: int, channels: int) -> None:
        super().__init__()
        self.mask_fcn1 = nn.Conv2d(inner, width, 3, 1, 1)
        self.mask_fcn2 = nn.Conv2d(width, width, 3, 1, 1)
        self.mask_fcn3 = nn.Conv2d(width, width, 3, 1, 1)
        self.mask_fcn4 = nn.Conv2d(width, width, 3, 1, 1)
        self.deconv = nn.ConvTranspose2d(width, width, 2, 2)
        self.predictor = nn.Conv2d(width, channels, 1)

    def forward(self, pooled: Float[Tensor, "B N C 14 14"], clusters: Int[Tensor, "B N"]) -> Float[Tensor, "B N 28 28"]:
        """Mask logits of each box for its own cluster, which is all that is computed of the last layer."""
        maps = pooled.flatten(0, 1)
        for convolution in (self.mask_fcn1, self.mask_fcn2, self.mask_fcn3, self.mask_fcn4):
            maps = functional.relu(convolution(maps))
        maps = functional.relu(self.deconv(maps)).flatten(2)  # B*N D 28*28
        channel = clusters.flatten() if self.predictor.out_channels > 1 else torch.zeros_like(clusters.flatten())
        weight = self.predictor.weight.flatten(1)[channel][:, None]  # B*N 1 D
        assert self.predictor.bias is not None, "the predictor has a bias"
        logits = torch.matmul(weight, maps)[:, 0] + self.predictor.bias[channel][:, None]
        return logits.reshape(*pooled.shape[:2], MASK_SIDE, MASK_SIDE)


class CascadeHeads(nn.Module):
    """Three box heads, each on the boxes of the one before, and a mask head for the boxes that remain.

    Cascade R-CNN, section 4; detectron2/modeling/roi_heads/cascade_rcnn.py, with class-agnostic boxes.
    """

    def __init__(
        self, inner: int, box_width: int, mask_width: int, clusters: int, mask_channels: int, sampling: Sampling
    ) -> None:
        super().__init__()
        self.sampling = sampling
        self.pool = pool
        """Exchanged for its ONNX operator while a graph is written."""
        stages = range(len(STAGE_WEIGHTS))
        self.box_head = nn.ModuleList(BoxHead(inner, box_width) for _ in stages)
        self.box_predictor = nn.ModuleList(BoxPredictor(box_width, clusters) for _ in stages)
        self.mask_head = MaskHead(inner, mask_width, mask_channels)

    def run_stage(self, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
        """What stage 0, 1 or 2 says about any boxes, from p2 to p5."""
        pooled = self.pool(levels[: len(STRIDES_PX)], STRIDES_PX, boxes, BOX_SIDE, self.sampling)
        logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return StageOutput(logits=logits, deltas=deltas, boxes=decode(boxes, deltas, STAGE_WEIGHTS[stage]))

    def refine(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B N K+1"], Float[Tensor, "B N 4"]]:
        """Class probabilities, the mean of all stages, and the boxes after the last, cut to their pictures."""
        probabilities = []
        for stage in range(len(STAGE_WEIGHTS)):
            output = self.run_stage(stage, levels, boxes)
            probabilities.append(output.logits.softmax(-1))
            boxes = clip(output.boxes, sizes)
        return torch.stack(probabilities).mean(0), boxes

    def draw_masks(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], clusters: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N 28 28"]:
        """Mask logits inside each box for its cluster, counted from 0."""
        pooled = self.pool(levels[: len(STRIDES_PX)], STRIDES_PX, boxes, MASK_SIDE // 2, self.sampling)
        logits: Tensor = self.mask_head(pooled, clusters)
        return logits
