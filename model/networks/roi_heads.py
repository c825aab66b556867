"""The cascade of box heads and the mask head: proposals to classes, better boxes and masks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.errors import ConfigError
from model.networks.boxes import apply_deltas, clip_boxes, nms
from model.networks.resnet import STAGE_STRIDES_PX
from model.networks.roi_align import RoiAlignConfig, roi_align
from model.networks.rpn import gather_boxes

STAGE_DELTA_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Of the box deltas; each stage speaks in finer units."""
BOX_POOL_SIZE = 7
MASK_SIZE = 28
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
        self.fc1 = nn.Linear(inner * BOX_POOL_SIZE**2, width)
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
        return logits.reshape(*pooled.shape[:2], MASK_SIZE, MASK_SIZE)


class CascadeROIHeads(nn.Module):
    """Three box heads, each on the boxes of the one before, and a mask head for the boxes that remain.

    Cascade R-CNN, section 4; detectron2/modeling/roi_heads/cascade_rcnn.py, with class-agnostic boxes.
    """

    def __init__(
        self,
        inner: int,
        box_fc_dim: int,
        mask_conv_dim: int,
        clusters: int,
        mask_channels: int,
        sampling: RoiAlignConfig,
    ) -> None:
        super().__init__()
        self.sampling = sampling
        self.pool = roi_align
        """Exchanged for its ONNX operator while a graph is written."""
        stages = range(len(STAGE_DELTA_WEIGHTS))
        self.box_head = nn.ModuleList(BoxHead(inner, box_fc_dim) for _ in stages)
        self.box_predictor = nn.ModuleList(BoxPredictor(box_fc_dim, clusters) for _ in stages)
        self.mask_head = MaskHead(inner, mask_conv_dim, mask_channels)

    def run_stage(self, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
        """What stage 0, 1 or 2 says about any boxes, from p2 to p5."""
        pooled = self.pool(levels[: len(STAGE_STRIDES_PX)], STAGE_STRIDES_PX, boxes, BOX_POOL_SIZE, self.sampling)
        logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return StageOutput(logits=logits, deltas=deltas, boxes=apply_deltas(boxes, deltas, STAGE_DELTA_WEIGHTS[stage]))

    def refine(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B N K+1"], Float[Tensor, "B N 4"]]:
        """Class probabilities, the mean of all stages, and the boxes after the last, cut to their pictures."""
        probabilities = []
        for stage in range(len(STAGE_DELTA_WEIGHTS)):
            output = self.run_stage(stage, levels, boxes)
            probabilities.append(output.logits.softmax(-1))
            boxes = clip_boxes(output.boxes, sizes)
        return torch.stack(probabilities).mean(0), boxes

    def draw_masks(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], clusters: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N 28 28"]:
        """Mask logits inside each box for its cluster, counted from 0."""
        pooled = self.pool(levels[: len(STAGE_STRIDES_PX)], STAGE_STRIDES_PX, boxes, MASK_SIZE // 2, self.sampling)
        logits: Tensor = self.mask_head(pooled, clusters)
        return logits


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """How many detections are kept, and which."""

    score: float = 0.05
    """Pairs of box and cluster must score above; 0..1."""
    overlap: float = 0.5
    """Boxes of one cluster that overlap a better one beyond this IoU are dropped; 0..1."""
    candidates: int = 1000
    """Best pairs of box and cluster that are looked at; at least 1."""
    total: int = 100
    """Detections of a picture; at least 1."""
    nms_iterations: int = 16
    """See `nms`; at least 1. The longest chain seen needs 15. Even, so as to keep a box too many and lose none."""

    def __post_init__(self) -> None:
        if min(self.candidates, self.total, self.nms_iterations) < 1 or not all(
            0.0 <= share <= 1.0 for share in (self.score, self.overlap)
        ):
            raise ConfigError(f"counts must be at least 1, the score and the overlap lie in 0..1, got {self}")


class Detections(NamedTuple):
    """A fixed number, best first; those unused come last, all zero."""

    scores: Float[Tensor, "B D"]
    clusters: Int[Tensor, "B D"]
    """Counted from 0."""
    boxes: Float[Tensor, "B D 4"]


def find_top_detections(
    probabilities: Float[Tensor, "B N K+1"],
    boxes: Float[Tensor, "B N 4"],
    is_used: Bool[Tensor, "B N"],
    limits: DetectionConfig,
) -> Detections:
    """The best pairs of box and cluster, suppressed within their cluster.

    As detectron2's `fast_rcnn_inference`, but static: suppression by sweeps, and only the best `limits.candidates`
    pairs take part. No pair is touched by a worse one, so that this changes nothing unless fewer than `limits.total` of
    them stay while pairs beyond them pass the score.
    """
    clusters = probabilities.shape[2] - 1
    scores = torch.where(is_used[..., None], probabilities[..., :-1], 0.0).flatten(1)
    scores = torch.where(scores > limits.score, scores, 0.0)
    scores, index = scores.topk(min(limits.candidates, scores.shape[1]), dim=1)
    chosen, cluster = gather_boxes(boxes, index // clusters), index % clusters
    keep = nms(chosen, scores > 0.0, limits.overlap, limits.nms_iterations, cluster)
    scores, order = torch.where(keep, scores, 0.0).topk(min(limits.total, scores.shape[1]), dim=1)
    is_found = scores > 0.0
    missing = limits.total - scores.shape[1]
    return Detections(
        scores=functional.pad(scores, (0, missing)),
        clusters=functional.pad(torch.where(is_found, cluster.gather(1, order), 0), (0, missing)),
        boxes=functional.pad(torch.where(is_found[..., None], gather_boxes(chosen, order), 0.0), (0, 0, 0, missing)),
    )
