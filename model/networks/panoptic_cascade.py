"""The sizes of a panoptic cascade, as given or as a state dict shows them."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from model.errors import CheckpointError, ConfigError
from model.networks.fpn import FPN, SIDE_MULTIPLE_PX, SimpleFPN
from model.networks.interface import NetworkOutput
from model.networks.resnet import FrozenBatchNorm, Norm, NormedConv, ResNet
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import CascadeROIHeads, DetectionConfig, find_top_detections
from model.networks.rpn import RPN, ProposalConfig, find_top_proposals
from model.networks.vit import HEAD_DIM, EncoderConfig, infer_encoder_config

Backbone = Literal["resnet50", "vit"]

_ENCODER_PREFIX = "backbone.net."


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Sizes that the weights fix; the defaults are the paper's, but for the clusters."""

    thing_clusters: int
    stuff_clusters: int = 27
    """0: no semantic head, as in CutLER."""
    backbone: Backbone = "resnet50"
    encoder: EncoderConfig | None = None
    """The ViT's; its grid is that of the stored positions."""
    stem_out_channels: int = 64
    """This and what follows up to the pyramid: ResNet-50's."""
    bottleneck_channels: int = 64
    """Channels inside the blocks of res2; each stage doubles them."""
    res2_out_channels: int = 256
    """Channels that leave res2; each stage doubles them."""
    backbone_norm: Norm = "batch"
    fpn_channels: int = 256
    fpn_norm: Norm = "batch"
    """Over ResNet-50; a ViT's pyramid has layer norms."""
    box_fc_dim: int = 1024
    mask_conv_dim: int = 256
    cls_agnostic_mask: bool = False
    """One mask for all clusters instead of one for each."""
    sem_seg_conv_dim: int = 128

    def __post_init__(self) -> None:
        if self.thing_clusters < 1 or self.stuff_clusters < 0:
            raise ConfigError(f"{self.thing_clusters} thing and {self.stuff_clusters} stuff clusters: too few")
        if (self.backbone == "vit") != (self.encoder is not None):
            raise ConfigError(f"backbone {self.backbone}, encoder {self.encoder}: a ViT has one, ResNet-50 has none")
        if self.encoder is not None and self.encoder.width % HEAD_DIM:
            raise ConfigError(f"an encoder {self.encoder.width} wide: expected a multiple of {HEAD_DIM}")

    @property
    def mask_channels(self) -> int:
        return 1 if self.cls_agnostic_mask else self.thing_clusters


def infer_cascade_config(state: dict[str, Tensor]) -> CascadeConfig:
    """The shape that a state dict in detectron2's names describes; whether all of it fits is found when it is loaded.

    Raises CheckpointError if a tensor that shows a size is missing.
    """
    try:
        return _infer_with_vit(state) if f"{_ENCODER_PREFIX}pos_embed" in state else _infer_with_resnet(state)
    except (KeyError, IndexError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"no panoptic cascade in detectron2's names: its tensors do not fit ({error})") from error


def _infer_with_resnet(state: dict[str, Tensor]) -> CascadeConfig:
    return replace(
        _infer_heads(state),
        stem_out_channels=len(state["backbone.bottom_up.stem.conv1.weight"]),
        bottleneck_channels=len(state["backbone.bottom_up.res2.0.conv1.weight"]),
        res2_out_channels=len(state["backbone.bottom_up.res2.0.conv3.weight"]),
        backbone_norm=_infer_norm(state, "backbone.bottom_up.stem.conv1"),
        fpn_channels=len(state["backbone.fpn_lateral2.weight"]),
        fpn_norm=_infer_norm(state, "backbone.fpn_lateral2"),
    )


def _infer_with_vit(state: dict[str, Tensor]) -> CascadeConfig:
    encoder = {name.removeprefix(_ENCODER_PREFIX): state[name] for name in state if name.startswith(_ENCODER_PREFIX)}
    return replace(
        _infer_heads(state),
        backbone="vit",
        encoder=infer_encoder_config(encoder),
        fpn_channels=len(state["backbone.simfp_4.0.weight"]),
    )


def _infer_heads(state: dict[str, Tensor]) -> CascadeConfig:
    """All but the backbone and its pyramid."""
    semantic = "sem_seg_head.predictor.weight"
    return CascadeConfig(
        thing_clusters=len(state["roi_heads.box_predictor.0.cls_score.weight"]) - 1,
        stuff_clusters=len(state[semantic]) - 1 if semantic in state else 0,
        box_fc_dim=len(state["roi_heads.box_head.0.fc1.weight"]),
        mask_conv_dim=len(state["roi_heads.mask_head.mask_fcn1.weight"]),
        cls_agnostic_mask=len(state["roi_heads.mask_head.predictor.weight"]) == 1,
        sem_seg_conv_dim=state[semantic].shape[1] if semantic in state else CascadeConfig.sem_seg_conv_dim,
    )


def _infer_norm(state: dict[str, Tensor], convolution: str) -> Norm:
    if f"{convolution}.norm.num_batches_tracked" in state:
        return "batch"
    return "frozen" if f"{convolution}.norm.running_mean" in state else "none"


_SEMANTIC_LEVELS = ("p2", "p3", "p4", "p5")


class ConvNormRelu(NormedConv):
    """3x3 convolution, group norm, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, norm="group")

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return functional.relu(super().forward(input))


class SemanticHead(nn.Module):
    """Each level brought to stride 4 by steps of convolution and doubling, then summed.

    Panoptic Feature Pyramid Networks, section 4.1; detectron2/modeling/meta_arch/semantic_seg.py. Unlike there, the
    logits stay at stride 4: whoever needs pixels enlarges them.
    """

    def __init__(self, inner: int, width: int, classes: int) -> None:
        super().__init__()
        for index, name in enumerate(_SEMANTIC_LEVELS):
            steps: list[nn.Module] = []
            for step in range(max(1, index)):
                steps.append(ConvNormRelu(inner if step == 0 else width, width))
                if index:
                    steps.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
            self.add_module(name, nn.Sequential(*steps))
        self.predictor = nn.Conv2d(width, classes, 1)

    def forward(self, levels: tuple[Float[Tensor, "B C h w"], ...]) -> Float[Tensor, "B S+1 h w"]:
        """Logits at the stride of p2, from p2 to p5; further levels are ignored."""
        risen = [self.get_submodule(name)(maps) for name, maps in zip(_SEMANTIC_LEVELS, levels, strict=False)]
        logits: Tensor = self.predictor(torch.stack(risen).sum(0))
        return logits


PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class CascadeInferenceConfig:
    """Choices of inference that no weight depends on; the defaults are the paper's."""

    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    detections: DetectionConfig = field(default_factory=DetectionConfig)
    sampling: RoiAlignConfig = field(default_factory=RoiAlignConfig)


class PanopticCascade(nn.Module):
    """uint8 pictures to the raw answer of a session, in one static graph, under detectron2's parameter names.

    detectron2's PanopticFPN with CascadeROIHeads as U2Seg configures it (configs/COCO-PanopticSegmentation), or
    the same heads over a ViT.
    """

    def __init__(self, shape: CascadeConfig, limits: CascadeInferenceConfig) -> None:
        super().__init__()
        self.shape = shape
        self.limits = limits
        self.backbone = make_backbone(shape)
        self.proposal_generator = RPN(shape.fpn_channels)
        self.roi_heads = CascadeROIHeads(
            shape.fpn_channels, shape.box_fc_dim, shape.mask_conv_dim, shape.thing_clusters,
            shape.mask_channels, limits.sampling,
        )  # fmt: skip
        if shape.stuff_clusters:
            self.sem_seg_head = SemanticHead(shape.fpn_channels, shape.sem_seg_conv_dim, shape.stuff_clusters + 1)

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """Answers for pictures at the top left of their pixels; what lies beyond `sizes` (height, width) is ignored.

        How much lies there still matters to a ViT (see `SimpleFPN`). H and W are multiples of 32. Masks are
        probabilities in 28 x 28 cells of their box; semantic logits come at stride 4, padding included.
        """
        height, width = pixels.shape[2:]
        if height % SIDE_MULTIPLE_PX or width % SIDE_MULTIPLE_PX:
            raise ConfigError(f"pictures of {height}x{width} px: expected multiples of {SIDE_MULTIPLE_PX}")
        return self.answer(self.backbone(normalize_and_mask(pixels, sizes)), sizes)

    def answer(self, levels: tuple[Float[Tensor, "B C h w"], ...], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """The raw answer from p2 to p6."""
        proposals = find_top_proposals(self.proposal_generator(levels), sizes, self.limits.proposals)
        probabilities, boxes = self.roi_heads.refine(levels, proposals.boxes, sizes)
        found = find_top_detections(probabilities, boxes, proposals.is_used, self.limits.detections)
        masks = self.roi_heads.draw_masks(levels, found.boxes, found.clusters).sigmoid()
        semantic = self.sem_seg_head(levels) if self.shape.stuff_clusters else torch.zeros_like(levels[0][:, :1])
        return NetworkOutput(
            scores=found.scores, clusters=found.clusters, boxes=found.boxes, masks=masks, semantic=semantic
        )


def make_backbone(shape: CascadeConfig) -> FPN | SimpleFPN:
    """An untrained backbone with its pyramid."""
    if shape.encoder is not None:
        return SimpleFPN(shape.encoder, shape.fpn_channels)
    bottom_up = ResNet(shape.stem_out_channels, shape.bottleneck_channels, shape.res2_out_channels, shape.backbone_norm)
    return FPN(bottom_up, shape.fpn_channels, shape.fpn_norm)


def normalize_and_mask(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
    """ImageNet's mean and deviation taken out of the pictures of `sizes`, zeros below and to the right of them.

    In detectron2's units and order, so that not even the rounding differs: a deep network of random weights makes a
    thousand times as much of a last bit.
    """
    channels = zip(pixels.float().unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True)
    normalised = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
    rows = torch.arange(pixels.shape[2], device=pixels.device)[:, None] < sizes[:, 0, None, None]  # B H 1
    columns = torch.arange(pixels.shape[3], device=pixels.device) < sizes[:, 1, None, None]  # B 1 W
    return torch.where((rows & columns)[:, None], normalised, 0.0)


_BATCH_NORM_EPS = 1e-5
"""torch's for batch norms, which detectron2 keeps."""


def fold_batch_norms(network: PanopticCascade) -> PanopticCascade:
    """The network for inference, each batch norm in the weight and the bias of the convolution before it.

    Exporters do this too; done here, the folded weights can be stored in half the bytes and are found by name.
    """
    state = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, NormedConv) and isinstance(module.norm, nn.BatchNorm2d | FrozenBatchNorm):
            for key in module.norm.state_dict():
                del state[f"{name}.norm.{key}"]
            state[f"{name}.weight"], state[f"{name}.bias"] = _fold_batch_norm(module.weight, module.norm)
    shape = replace(network.shape, backbone_norm="none", fpn_norm="none")
    folded = PanopticCascade(shape, network.limits)
    folded.load_state_dict(state)
    return folded.eval().requires_grad_(False)


def _fold_batch_norm(weight: Tensor, norm: nn.BatchNorm2d | FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None, "batch norms keep their statistics"
    assert norm.running_var is not None, "batch norms keep their statistics"
    scale = norm.weight / torch.sqrt(norm.running_var + _BATCH_NORM_EPS)
    return (weight * scale[:, None, None, None]).detach(), (norm.bias - norm.running_mean * scale).detach()
