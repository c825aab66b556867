"""U2Seg's network: backbone and feature pyramid, region proposals, cascaded RoI heads, semantic head."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model.errors import CheckpointError, ConfigError
from model.networks.backbones import FPN, FrozenBatchNorm, Norm, NormedConv, ResNet, SimpleFPN
from model.networks.interface import Network, NetworkOutput, normalize_and_mask
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import CascadeROIHeads, DetectionConfig, find_top_detections
from model.networks.rpn import RPN, ProposalConfig, find_top_proposals
from model.networks.vit import EncoderConfig, infer_encoder_config

Backbone = Literal["resnet50", "vit"]

_ENCODER_PREFIX = "backbone.net."
_SEMANTIC_LEVELS = ("p2", "p3", "p4", "p5")
_BATCH_NORM_EPS = 1e-5
"""torch's default, which detectron2 keeps."""


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Sizes of the network, as its weights have them. The defaults are the paper's."""

    thing_clusters: int
    stuff_clusters: int = 27
    """0: no semantic head, as in CutLER."""
    backbone: Backbone = "resnet50"
    encoder: EncoderConfig | None = None
    """The ViT backbone; its grid is that of the stored position embeddings."""
    stem_out_channels: int = 64
    """ResNet-50 only, like the next three."""
    bottleneck_channels: int = 64
    """Channels inside the blocks of res2; each stage doubles them."""
    res2_out_channels: int = 256
    """Output channels of res2; each stage doubles them."""
    backbone_norm: Norm = "batch"
    fpn_channels: int = 256
    fpn_norm: Norm = "batch"
    """For ResNet-50; the pyramid over a ViT has layer norms."""
    box_fc_dim: int = 1024
    mask_conv_dim: int = 256
    cls_agnostic_mask: bool = False
    """Predict one mask for all clusters instead of one per cluster."""
    sem_seg_conv_dim: int = 128

    def __post_init__(self) -> None:
        if self.thing_clusters < 1 or self.stuff_clusters < 0:
            raise ConfigError(
                f"{self.thing_clusters} thing and {self.stuff_clusters} stuff clusters: expected at least 1 and 0"
            )
        if (self.backbone == "vit") != (self.encoder is not None):
            raise ConfigError(f"backbone {self.backbone} with encoder {self.encoder}: only a ViT has an encoder")


@dataclass(frozen=True, kw_only=True)
class CascadeInferenceConfig:
    """Settings of inference that no weight depends on. The defaults are the paper's."""

    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    detections: DetectionConfig = field(default_factory=DetectionConfig)
    pooling: RoiAlignConfig = field(default_factory=RoiAlignConfig)


class ConvNormRelu(NormedConv):
    """3x3 convolution, group norm, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, norm="group")

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return functional.relu(super().forward(input))


class SemanticHead(nn.Module):
    """Upsamples each level to stride 4 in steps of convolution and resizing, and sums them.

    Panoptic Feature Pyramid Networks, section 4.1; detectron2/modeling/meta_arch/semantic_seg.py. Unlike there, the
    logits stay at stride 4; postprocessing resizes them.
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
        """Logits at the stride of p2, from p2 to p5; p6 is ignored."""
        upsampled = [self.get_submodule(name)(maps) for name, maps in zip(_SEMANTIC_LEVELS, levels, strict=False)]
        logits: Tensor = self.predictor(torch.stack(upsampled).sum(0))
        return logits


class PanopticCascade(Network):
    """One static graph from uint8 images to the network output, with detectron2's parameter names.

    detectron2's PanopticFPN with CascadeROIHeads as U2Seg configures it (configs/COCO-PanopticSegmentation), or
    the same heads over a ViT.
    """

    side_multiple_px = 32
    """So that each level of the pyramid is exactly twice as large as the next."""

    def __init__(self, config: CascadeConfig, inference: CascadeInferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.inference = inference
        self.backbone: FPN | SimpleFPN
        if config.encoder is not None:
            self.backbone = SimpleFPN(config.encoder, config.fpn_channels)
        else:
            widths = config.stem_out_channels, config.bottleneck_channels, config.res2_out_channels
            self.backbone = FPN(ResNet(*widths, config.backbone_norm), config.fpn_channels, config.fpn_norm)
        self.proposal_generator = RPN(config.fpn_channels)
        self.roi_heads = CascadeROIHeads(
            config.fpn_channels, config.box_fc_dim, config.mask_conv_dim, config.thing_clusters,
            1 if config.cls_agnostic_mask else config.thing_clusters, inference.pooling,
        )  # fmt: skip
        if config.stuff_clusters:
            self.sem_seg_head = SemanticHead(config.fpn_channels, config.sem_seg_conv_dim, config.stuff_clusters + 1)

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """Predict for images at the top left of `pixels`; the padding beyond `sizes` (height, width) is set to zero.

        H and W are multiples of 32. Masks are probabilities in 28 x 28 pixels of their box; semantic logits come at
        stride 4, padding included. With a ViT the amount of padding changes the output (see `SimpleFPN`).
        """
        height, width = pixels.shape[2:]
        if height % self.side_multiple_px or width % self.side_multiple_px:
            raise ConfigError(f"input of {height}x{width} px: expected multiples of {self.side_multiple_px}")
        levels = self.backbone(normalize_and_mask(pixels, sizes))
        proposals = find_top_proposals(self.proposal_generator(levels), sizes, self.inference.proposals)
        probabilities, boxes = self.roi_heads.predict_boxes(levels, proposals.boxes, sizes)
        detections = find_top_detections(probabilities, boxes, proposals.is_valid, self.inference.detections)
        masks = self.roi_heads.predict_masks(levels, detections.boxes, detections.clusters).sigmoid()
        semantic = self.sem_seg_head(levels) if self.config.stuff_clusters else torch.zeros_like(levels[0][:, :1])
        return NetworkOutput(**detections._asdict(), masks=masks, semantic=semantic)


def infer_cascade_config(state: dict[str, Tensor]) -> CascadeConfig:
    """Infer the network's sizes from a state dict with detectron2's names; loading it checks all other tensors.

    Raises CheckpointError if a tensor that defines a size is missing.
    """
    semantic = state.get("sem_seg_head.predictor.weight")
    try:
        return CascadeConfig(
            thing_clusters=len(state["roi_heads.box_predictor.0.cls_score.weight"]) - 1,
            stuff_clusters=0 if semantic is None else len(semantic) - 1,
            box_fc_dim=len(state["roi_heads.box_head.0.fc1.weight"]),
            mask_conv_dim=len(state["roi_heads.mask_head.mask_fcn1.weight"]),
            cls_agnostic_mask=len(state["roi_heads.mask_head.predictor.weight"]) == 1,
            sem_seg_conv_dim=CascadeConfig.sem_seg_conv_dim if semantic is None else semantic.shape[1],
            **_infer_backbone(state),
        )
    except (KeyError, IndexError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"not a panoptic cascade with detectron2's names: its tensors do not fit ({error})"
        ) from error


def _infer_backbone(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the entries of the configuration that describe the backbone and its feature pyramid."""
    if f"{_ENCODER_PREFIX}pos_embed" in state:
        encoder = {
            name.removeprefix(_ENCODER_PREFIX): state[name] for name in state if name.startswith(_ENCODER_PREFIX)
        }
        width = len(state["backbone.simfp_4.0.weight"])
        return {"backbone": "vit", "encoder": infer_encoder_config(encoder), "fpn_channels": width}
    return {
        "stem_out_channels": len(state["backbone.bottom_up.stem.conv1.weight"]),
        "bottleneck_channels": len(state["backbone.bottom_up.res2.0.conv1.weight"]),
        "res2_out_channels": len(state["backbone.bottom_up.res2.0.conv3.weight"]),
        "backbone_norm": _infer_norm(state, "backbone.bottom_up.stem.conv1"),
        "fpn_channels": len(state["backbone.fpn_lateral2.weight"]),
        "fpn_norm": _infer_norm(state, "backbone.fpn_lateral2"),
    }


def _infer_norm(state: dict[str, Tensor], convolution: str) -> Norm:
    if f"{convolution}.norm.num_batches_tracked" in state:
        return "batch"
    return "frozen" if f"{convolution}.norm.running_mean" in state else "none"


def fold_batch_norms(network: PanopticCascade) -> PanopticCascade:
    """Return a copy for inference with each batch norm folded into the weight and bias of its convolution.

    The exporter folds them too; done here, the folded weights keep their names and can be stored as fp16.
    """
    state = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, NormedConv) and isinstance(module.norm, nn.BatchNorm2d | FrozenBatchNorm):
            norm = {key: state.pop(f"{name}.norm.{key}") for key in module.norm.state_dict()}
            mean, variance, scale, shift = (norm[key] for key in ("running_mean", "running_var", "weight", "bias"))
            state[f"{name}.weight"], state[f"{name}.bias"] = fuse_conv_bn_weights(
                module.weight, None, mean, variance, _BATCH_NORM_EPS, scale, shift
            )
    config = replace(network.config, backbone_norm="none", fpn_norm="none")
    folded = PanopticCascade(config, network.inference)
    folded.load_state_dict(state)
    return folded.eval().requires_grad_(False)
