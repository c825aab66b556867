"""Where something might be: anchors, the head that scores and moves them, and the best of what it says."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.errors import ConfigError
from model.networks.boxes import apply_deltas, clip_boxes, is_nonempty, nms
from model.networks.fpn import FPN_STRIDES_PX

ANCHOR_SIDES_PX = (32.0, 64.0, 128.0, 256.0, 512.0)
"""One size a level, p2 to p6."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""
_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """How many boxes are kept, and which."""

    pre_nms_topk: int = 1000
    """Best anchors of a level that are looked at, or all where there are fewer; at least 1."""
    total: int = 1000
    """Proposals of a picture; at least 1."""
    overlap: float = 0.65
    """Boxes of one level that overlap a better one beyond this IoU are dropped; 0..1."""
    nms_iterations: int = 24
    """See `nms`; at least 1. The longest chain seen needs 18. Even, so as to keep a box too many and lose none."""

    def __post_init__(self) -> None:
        if min(self.pre_nms_topk, self.total, self.nms_iterations) < 1 or not 0.0 <= self.overlap <= 1.0:
            raise ConfigError(f"counts must be at least 1 and the overlap lie in 0..1, got {self}")


class RPNOutput(NamedTuple):
    """What the head says about the anchors of one level."""

    logits: Float[Tensor, "B A h w"]
    deltas: Float[Tensor, "B 4A h w"]
    """Channel 4 a + i is number i of anchor a's dx, dy, dw, dh."""


class Proposals(NamedTuple):
    """A fixed number of boxes, best first; those unused come last."""

    boxes: Float[Tensor, "B P 4"]
    logits: Float[Tensor, "B P"]
    """Minus infinity where unused."""
    is_used: Bool[Tensor, "B P"]


class RPNHead(nn.Module):
    """One small convolutional head for all levels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.objectness_logits = nn.Conv2d(width, len(ASPECT_RATIOS), 1)
        self.anchor_deltas = nn.Conv2d(width, 4 * len(ASPECT_RATIOS), 1)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> RPNOutput:
        hidden = functional.relu(self.conv(maps))
        return RPNOutput(logits=self.objectness_logits(hidden), deltas=self.anchor_deltas(hidden))


class RPN(nn.Module):
    """The region proposal network (Faster R-CNN, section 3.1; detectron2/modeling/proposal_generator/rpn.py)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rpn_head = RPNHead(width)

    def forward(self, levels: tuple[Float[Tensor, "B C h w"], ...]) -> list[RPNOutput]:
        """The head's word on every level, p2 to p6."""
        return [self.rpn_head(maps) for maps in levels]


def find_top_proposals(outputs: list[RPNOutput], sizes: Int[Tensor, "B 2"], limits: ProposalConfig) -> Proposals:
    """The best boxes of all levels, cut to their pictures of `sizes` (height, width), suppressed within their level.

    As detectron2's `find_top_rpn_proposals`, but static: suppression by sweeps, unused places instead of a shorter
    list. Their number is `limits.total`, or `limits.pre_nms_topk` of each level where this is less: the picture's size
    does not change it.
    """
    ranked = [
        _rank_level(output, stride_px, side_px, sizes, limits)
        for output, stride_px, side_px in zip(outputs, FPN_STRIDES_PX, ANCHOR_SIDES_PX, strict=True)
    ]
    boxes = torch.stack([each.boxes for each in ranked], dim=1)  # B L k 4
    logits = torch.stack([each.logits for each in ranked], dim=1)
    is_usable = is_nonempty(boxes) & (logits > -torch.inf)
    keep = nms(boxes.flatten(0, 1), is_usable.flatten(0, 1), limits.overlap, limits.nms_iterations)
    logits = torch.where(keep.unflatten(0, (-1, len(ranked))), logits, -torch.inf).flatten(1)
    best, index = logits.topk(min(limits.total, logits.shape[1]), dim=1)
    return Proposals(boxes=gather_boxes(boxes.flatten(1, 2), index), logits=best, is_used=best > -torch.inf)


class RankedLevel(NamedTuple):
    """The best anchors of one level, moved, best first; those that are missing have a logit of minus infinity."""

    boxes: Float[Tensor, "B k 4"]
    logits: Float[Tensor, "B k"]


def _rank_level(
    output: RPNOutput, stride_px: int, side_px: float, sizes: Int[Tensor, "B 2"], limits: ProposalConfig
) -> RankedLevel:
    logits, deltas = flatten_predictions(output)
    height, width = output.logits.shape[2:]
    anchors = make_anchors(height, width, stride_px, side_px, logits.device)
    # A level of fewer anchors fills the rest with its last one, unused: how many are looked at stays a constant.
    best, index = functional.pad(logits, (0, limits.pre_nms_topk), value=-torch.inf).topk(limits.pre_nms_topk, dim=1)
    index = index.clamp(max=logits.shape[1] - 1)
    return RankedLevel(
        boxes=clip_boxes(apply_deltas(anchors[index], gather_boxes(deltas, index), _DELTA_WEIGHTS), sizes), logits=best
    )


def flatten_predictions(output: RPNOutput) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N 4"]]:
    """Logits and deltas in the order of the anchors."""
    logits = output.logits.permute(0, 2, 3, 1).flatten(1)
    deltas = output.deltas.permute(0, 2, 3, 1).flatten(1)  # B h*w*A*4
    return logits, deltas.unflatten(1, (-1, 4))


def make_anchors(
    height: int, width: int, stride_px: int, side_px: float, device: torch.device | None = None
) -> Float[Tensor, "N 4"]:
    """Boxes around the top left corner of each cell of a level: row by row, then column, then aspect."""
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


def gather_boxes(boxes: Float[Tensor, "B N 4"], index: Int[Tensor, "B k"]) -> Float[Tensor, "B k 4"]:
    """The rows that each picture's own index names."""
    return boxes.gather(1, index[..., None].expand(-1, -1, boxes.shape[2]))
