"""The paper's network: a feature pyramid, proposals and a cascade of heads for things, a semantic head for stuff."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from model.errors import ConfigError
from model.network.cascade import CascadeHeads
from model.network.cascade_shape import CascadeShape
from model.network.detections import DetectionLimits, select_detections
from model.network.proposals import ProposalGenerator, ProposalLimits, select_proposals
from model.network.pyramid import SIDE_MULTIPLE_PX, Pyramid
from model.network.raw import Raw
from model.network.resnet import ResNet
from model.network.roi import Sampling
from model.network.semantic import SemanticHead
from model.network.simple_pyramid import SimplePyramid

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class CascadeLimits:
    """Choices of inference that no weight depends on; the defaults are the paper's."""

    proposals: ProposalLimits = field(default_factory=ProposalLimits)
    detections: DetectionLimits = field(default_factory=DetectionLimits)
    sampling: Sampling = field(default_factory=Sampling)


class PanopticCascade(nn.Module):
    """uint8 pictures to the raw answer of a session, in one static graph, under detectron2's parameter names.

    detectron2's PanopticFPN with CascadeROIHeads as U2Seg configures it (configs/COCO-PanopticSegmentation), or
    the same heads over a ViT.
    """

    def __init__(self, shape: CascadeShape, limits: CascadeLimits) -> None:
        super().__init__()
        self.shape = shape
        self.limits = limits
        self.backbone = make_backbone(shape)
        self.proposal_generator = ProposalGenerator(shape.pyramid_width)
        self.roi_heads = CascadeHeads(
            shape.pyramid_width, shape.box_width, shape.mask_width, shape.thing_clusters,
            shape.mask_channels, limits.sampling,
        )  # fmt: skip
        if shape.stuff_clusters:
            self.sem_seg_head = SemanticHead(shape.pyramid_width, shape.semantic_width, shape.stuff_clusters + 1)

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Raw:
        """Answers for pictures at the top left of their pixels; what lies beyond `sizes` (height, width) is ignored.

        How much lies there still matters to a ViT (see `SimplePyramid`). H and W are multiples of 32. Masks are
        probabilities in 28 x 28 cells of their box; semantic logits come at stride 4, padding included.
        """
        height, width = pixels.shape[2:]
        if height % SIDE_MULTIPLE_PX or width % SIDE_MULTIPLE_PX:
            raise ConfigError(f"pictures of {height}x{width} px: expected multiples of {SIDE_MULTIPLE_PX}")
        return self.answer(self.backbone(prepare(pixels, sizes)), sizes)

    def answer(self, levels: tuple[Float[Tensor, "B C h w"], ...], sizes: Int[Tensor, "B 2"]) -> Raw:
        """The raw answer from p2 to p6."""
        proposals = select_proposals(self.proposal_generator(levels), sizes, self.limits.proposals)
        probabilities, boxes = self.roi_heads.refine(levels, proposals.boxes, sizes)
        found = select_detections(probabilities, boxes, proposals.is_used, self.limits.detections)
        masks = self.roi_heads.draw_masks(levels, found.boxes, found.clusters).sigmoid()
        semantic = self.sem_seg_head(levels) if self.shape.stuff_clusters else torch.zeros_like(levels[0][:, :1])
        return Raw(scores=found.scores, clusters=found.clusters, boxes=found.boxes, masks=masks, semantic=semantic)


def make_backbone(shape: CascadeShape) -> Pyramid | SimplePyramid:
    """An untrained backbone with its pyramid."""
    if shape.encoder is not None:
        return SimplePyramid(shape.encoder, shape.pyramid_width)
    bottom_up = ResNet(shape.stem_width, shape.inner_width, shape.outer_width, shape.backbone_norm)
    return Pyramid(bottom_up, shape.pyramid_width, shape.pyramid_norm)


def prepare(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
    """ImageNet's mean and deviation taken out of the pictures of `sizes`, zeros below and to the right of them.

    In detectron2's units and order, so that not even the rounding differs: a deep network of random weights makes a
    thousand times as much of a last bit.
    """
    channels = zip(pixels.float().unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True)
    normalised = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
    rows = torch.arange(pixels.shape[2], device=pixels.device)[:, None] < sizes[:, 0, None, None]  # B H 1
    columns = torch.arange(pixels.shape[3], device=pixels.device) < sizes[:, 1, None, None]  # B 1 W
    return torch.where((rows & columns)[:, None], normalised, 0.0)
