"""RoI heads: a cascade of box heads, the mask head, and selection of the detections."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.networks.backbones import STAGE_STRIDES_PX
from model.networks.boxes import apply_deltas, clip_boxes, gather_boxes, nms
from model.networks.roi_align import RoiAlignConfig, roi_align, roi_align_onnx

STAGE_DELTA_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Weights of the box deltas of each stage: later stages predict smaller changes."""
BOX_POOL_SIZE = 7
MASK_SIZE = 28
"""Side of a predicted mask in pixels; its RoI features have half of it."""

Levels = tuple[Float[Tensor, "B C h w"], ...]


class StageOutput(NamedTuple):
    """Predictions of one stage for the boxes it was given."""

    logits: Float[Tensor, "B N K+1"]
    """The last class is "no object"."""
    deltas: Float[Tensor, "B N 4"]
    """Class-agnostic."""
    boxes: Float[Tensor, "B N 4"]
    """With the deltas applied; may extend beyond the image."""


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
    """Four convolutions, a deconvolution, and one mask per cluster or, with one channel, one for all clusters."""

    def __init__(self, inner: int, width: int, channels: int) -> None:
        super().__init__()
        self.mask_fcn1 = nn.Conv2d(inner, width, 3, 1, 1)
        self.mask_fcn2 = nn.Conv2d(width, width, 3, 1, 1)
        self.mask_fcn3 = nn.Conv2d(width, width, 3, 1, 1)
        self.mask_fcn4 = nn.Conv2d(width, width, 3, 1, 1)
        self.deconv = nn.ConvTranspose2d(width, width, 2, 2)
        self.predictor = nn.Conv2d(width, channels, 1)

    def forward(self, pooled: Float[Tensor, "B N C 14 14"], clusters: Int[Tensor, "B N"]) -> Float[Tensor, "B N 28 28"]:
        """Mask logits of each box for its own cluster; the last layer is computed for that cluster alone."""
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
    """Three box heads, each refining the boxes of the previous one, and a mask head for the final boxes.

    Cascade R-CNN, section 4; detectron2/modeling/roi_heads/cascade_rcnn.py, with class-agnostic boxes.
    """

    def __init__(
        self,
        inner: int,
        box_fc_dim: int,
        mask_conv_dim: int,
        clusters: int,
        mask_channels: int,
        pooling: RoiAlignConfig,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        stages = range(len(STAGE_DELTA_WEIGHTS))
        self.box_head = nn.ModuleList(BoxHead(inner, box_fc_dim) for _ in stages)
        self.box_predictor = nn.ModuleList(BoxPredictor(box_fc_dim, clusters) for _ in stages)
        self.mask_head = MaskHead(inner, mask_conv_dim, mask_channels)

    def pool(self, levels: Levels, boxes: Float[Tensor, "B N 4"], side: int) -> Float[Tensor, "B N C side side"]:
        """Pool the features p2 to p5 of each box."""
        levels = levels[: len(STAGE_STRIDES_PX)]
        if torch.onnx.is_in_onnx_export():
            return roi_align_onnx(levels, STAGE_STRIDES_PX, boxes, side)
        return roi_align(levels, STAGE_STRIDES_PX, boxes, side, self.pooling)

    def run_stage(self, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
        """Run stage 0, 1 or 2 on boxes."""
        logits, deltas = self.box_predictor[stage](self.box_head[stage](self.pool(levels, boxes, BOX_POOL_SIZE)))
        return StageOutput(logits=logits, deltas=deltas, boxes=apply_deltas(boxes, deltas, STAGE_DELTA_WEIGHTS[stage]))

    def predict_boxes(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], sizes: Int[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B N K+1"], Float[Tensor, "B N 4"]]:
        """Class probabilities, averaged over the stages, and the boxes of the last stage, clipped to their images."""
        probabilities = []
        for stage in range(len(STAGE_DELTA_WEIGHTS)):
            output = self.run_stage(stage, levels, boxes)
            probabilities.append(output.logits.softmax(-1))
            boxes = clip_boxes(output.boxes, sizes)
        return torch.stack(probabilities).mean(0), boxes

    def predict_masks(
        self, levels: Levels, boxes: Float[Tensor, "B N 4"], clusters: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N 28 28"]:
        """Mask logits inside each box, for its cluster (counted from 0)."""
        logits: Tensor = self.mask_head(self.pool(levels, boxes, MASK_SIZE // 2), clusters)
        return logits


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Which pairs of box and cluster become detections."""

    score_threshold: float = 0.05
    """Pairs must score above this, 0..1."""
    nms_threshold: float = 0.5
    """A box is dropped if a better one of its cluster overlaps it beyond this IoU, 0..1."""
    max_candidates: int = 1000
    """Best pairs that enter NMS; at least 1."""
    max_detections: int = 100
    """Detections of an image; at least 1."""
    nms_iterations: int = 16
    """At least 1, see `nms`. Longest chain measured: 15; even, so that a shorter run keeps boxes rather than drops."""


class Detections(NamedTuple):
    """A fixed number of detections, best first; missing ones are all zero."""

    scores: Float[Tensor, "B D"]
    clusters: Int[Tensor, "B D"]
    """Counted from 0."""
    boxes: Float[Tensor, "B D 4"]


def find_top_detections(
    probabilities: Float[Tensor, "B N K+1"],
    boxes: Float[Tensor, "B N 4"],
    is_valid: Bool[Tensor, "B N"],
    config: DetectionConfig,
) -> Detections:
    """Select the best pairs of box and cluster, by NMS within each cluster.

    detectron2's `fast_rcnn_inference` with a static shape: NMS of a fixed number of iterations, on the best
    `config.max_candidates` pairs only. A pair can only be dropped because of a better one, so the limit changes the
    result only if fewer than `config.max_detections` of the candidates remain and further pairs pass the threshold.
    """
    clusters = probabilities.shape[2] - 1
    scores = torch.where(is_valid[..., None], probabilities[..., :-1], 0.0).flatten(1)
    scores = torch.where(scores > config.score_threshold, scores, 0.0)
    scores, index = scores.topk(min(config.max_candidates, scores.shape[1]), dim=1)
    candidates, cluster = gather_boxes(boxes, index // clusters), index % clusters
    keep = nms(candidates, scores > 0.0, config.nms_threshold, config.nms_iterations, cluster)
    scores, order = torch.where(keep, scores, 0.0).topk(min(config.max_detections, scores.shape[1]), dim=1)
    is_detected = scores > 0.0
    missing = config.max_detections - scores.shape[1]
    selected = torch.where(is_detected[..., None], gather_boxes(candidates, order), 0.0)
    return Detections(
        scores=functional.pad(scores, (0, missing)),
        clusters=functional.pad(torch.where(is_detected, cluster.gather(1, order), 0), (0, missing)),
        boxes=functional.pad(selected, (0, 0, 0, missing)),
    )
