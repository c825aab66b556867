"""Region proposal network (RPN): anchors, the head that scores and moves them, and selection of the best."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.networks.backbones import FPN_STRIDES_PX
from model.networks.boxes import apply_deltas, clip_boxes, gather_boxes, is_nonempty, nms

ANCHOR_SIDES_PX = (32.0, 64.0, 128.0, 256.0, 512.0)
"""One size per level, p2 to p6."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
"""Height divided by width."""
_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """Which boxes become proposals."""

    pre_nms_topk: int = 1000
    """Best anchors of each level that enter NMS; at least 1."""
    post_nms_topk: int = 1000
    """Proposals of an image; at least 1."""
    nms_threshold: float = 0.65
    """A box is dropped if a better one of its level overlaps it beyond this IoU, 0..1."""
    nms_iterations: int = 24
    """At least 1, see `nms`. Longest chain measured: 18; even, so that a shorter run keeps boxes rather than drops."""


class RPNOutput(NamedTuple):
    """Predictions of the head for the anchors of one level."""

    logits: Float[Tensor, "B A h w"]
    deltas: Float[Tensor, "B 4A h w"]
    """Channels 4 a to 4 a + 3 are dx, dy, dw, dh of anchor a."""


class Proposals(NamedTuple):
    """A fixed number of boxes, best first, invalid ones last."""

    boxes: Float[Tensor, "B P 4"]
    is_valid: Bool[Tensor, "B P"]


class RPNHead(nn.Module):
    """Convolutional head shared by all levels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.objectness_logits = nn.Conv2d(channels, len(ASPECT_RATIOS), 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * len(ASPECT_RATIOS), 1)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> RPNOutput:
        hidden = functional.relu(self.conv(maps))
        return RPNOutput(logits=self.objectness_logits(hidden), deltas=self.anchor_deltas(hidden))


class RPN(nn.Module):
    """Region proposal network (Faster R-CNN, section 3.1; detectron2/modeling/proposal_generator/rpn.py)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rpn_head = RPNHead(channels)

    def forward(self, levels: tuple[Float[Tensor, "B C h w"], ...]) -> list[RPNOutput]:
        """Predictions for each level, p2 to p6."""
        return [self.rpn_head(maps) for maps in levels]


def find_top_proposals(outputs: list[RPNOutput], sizes: Int[Tensor, "B 2"], config: ProposalConfig) -> Proposals:
    """Select the best boxes of all levels, clipped to their images of `sizes` (height, width), by NMS per level.

    detectron2's `find_top_rpn_proposals` with a static shape: NMS of a fixed number of iterations, and invalid entries
    instead of a shorter list. The number of proposals does not depend on the size of the image: `config.post_nms_topk`,
    or `config.pre_nms_topk` for each level if that is less.
    """
    ranked = [
        _rank_level(output, stride_px, side_px, sizes, config)
        for output, stride_px, side_px in zip(outputs, FPN_STRIDES_PX, ANCHOR_SIDES_PX, strict=True)
    ]
    boxes, logits = (torch.stack(parts, dim=1) for parts in zip(*ranked, strict=True))  # B L k 4 and B L k
    is_valid = is_nonempty(boxes) & (logits > -torch.inf)
    keep = nms(boxes.flatten(0, 1), is_valid.flatten(0, 1), config.nms_threshold, config.nms_iterations)
    logits = torch.where(keep.unflatten(0, (-1, len(ranked))), logits, -torch.inf).flatten(1)
    best, index = logits.topk(min(config.post_nms_topk, logits.shape[1]), dim=1)
    return Proposals(boxes=gather_boxes(boxes.flatten(1, 2), index), is_valid=best > -torch.inf)


def _rank_level(
    output: RPNOutput, stride_px: int, side_px: float, sizes: Int[Tensor, "B 2"], config: ProposalConfig
) -> tuple[Float[Tensor, "B k 4"], Float[Tensor, "B k"]]:
    """Return boxes and logits of the best anchors of one level, best first; missing ones have logit -inf."""
    logits, deltas = flatten_predictions(output)
    height, width = output.logits.shape[2:]
    anchors = make_anchors(height, width, stride_px, side_px, logits.device)
    # A level of fewer anchors is filled up with copies of its last one, invalid, so that the count is constant.
    best, index = functional.pad(logits, (0, config.pre_nms_topk), value=-torch.inf).topk(config.pre_nms_topk, dim=1)
    index = index.clamp(max=logits.shape[1] - 1)
    boxes = apply_deltas(anchors[index], gather_boxes(deltas, index), _DELTA_WEIGHTS)
    return clip_boxes(boxes, sizes), best


def flatten_predictions(output: RPNOutput) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N 4"]]:
    """Logits and deltas in the order of `make_anchors`."""
    logits = output.logits.permute(0, 2, 3, 1).flatten(1)
    deltas = output.deltas.permute(0, 2, 3, 1).flatten(1)  # B h*w*A*4
    return logits, deltas.unflatten(1, (-1, 4))


def make_anchors(
    height: int, width: int, stride_px: int, side_px: float, device: torch.device | None = None
) -> Float[Tensor, "N 4"]:
    """Anchors centered on the top left corner of each pixel of a level, ordered by row, column, aspect ratio."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device) * float(stride_px),
        torch.arange(width, device=device) * float(stride_px),
        indexing="ij",
    )
    boxes = []
    for aspect in ASPECT_RATIOS:
        half_width = math.sqrt(side_px**2 / aspect) / 2.0
        half_height = aspect * half_width
        edges = [columns - half_width, rows - half_height, columns + half_width, rows + half_height]
        boxes.append(torch.stack(edges, dim=2))  # h w 4
    return torch.stack(boxes, dim=2).reshape(-1, 4)
