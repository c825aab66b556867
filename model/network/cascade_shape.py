"""The sizes of a panoptic cascade, as given or as a state dict shows them."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from model.errors import CheckpointError, ConfigError
from model.network.resnet import Norm
from model.network.vit import HEAD_WIDTH, EncoderShape, infer_encoder

Backbone = Literal["resnet50", "vit"]

_ENCODER = "backbone.net."


@dataclass(frozen=True, kw_only=True)
class CascadeShape:
    """Sizes that the weights fix; the defaults are the paper's, but for the clusters."""

    thing_clusters: int
    stuff_clusters: int = 27
    """0: no semantic head, as in CutLER."""
    backbone: Backbone = "resnet50"
    encoder: EncoderShape | None = None
    """The ViT's; its grid is that of the stored positions."""
    stem_width: int = 64
    """This and what follows up to the pyramid: ResNet-50's."""
    inner_width: int = 64
    """Channels inside the blocks of res2; each stage doubles them."""
    outer_width: int = 256
    """Channels that leave res2; each stage doubles them."""
    backbone_norm: Norm = "batch"
    pyramid_width: int = 256
    pyramid_norm: Norm = "batch"
    """Over ResNet-50; a ViT's pyramid has layer norms."""
    box_width: int = 1024
    mask_width: int = 256
    is_mask_agnostic: bool = False
    """One mask for all clusters instead of one for each."""
    semantic_width: int = 128

    def __post_init__(self) -> None:
        if self.thing_clusters < 1 or self.stuff_clusters < 0:
            raise ConfigError(f"{self.thing_clusters} thing and {self.stuff_clusters} stuff clusters: too few")
        if (self.backbone == "vit") != (self.encoder is not None):
            raise ConfigError(f"backbone {self.backbone}, encoder {self.encoder}: a ViT has one, ResNet-50 has none")
        if self.encoder is not None and self.encoder.width % HEAD_WIDTH:
            raise ConfigError(f"an encoder {self.encoder.width} wide: expected a multiple of {HEAD_WIDTH}")

    @property
    def mask_channels(self) -> int:
        return 1 if self.is_mask_agnostic else self.thing_clusters


def infer_shape(state: dict[str, Tensor]) -> CascadeShape:
    """The shape that a state dict in detectron2's names describes; whether all of it fits is found when it is loaded.

    Raises CheckpointError if a tensor that shows a size is missing.
    """
    try:
        return _infer_with_vit(state) if f"{_ENCODER}pos_embed" in state else _infer_with_resnet(state)
    except (KeyError, IndexError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"no panoptic cascade in detectron2's names: its tensors do not fit ({error})") from error


def _infer_with_resnet(state: dict[str, Tensor]) -> CascadeShape:
    return replace(
        _infer_heads(state),
        stem_width=len(state["backbone.bottom_up.stem.conv1.weight"]),
        inner_width=len(state["backbone.bottom_up.res2.0.conv1.weight"]),
        outer_width=len(state["backbone.bottom_up.res2.0.conv3.weight"]),
        backbone_norm=_infer_norm(state, "backbone.bottom_up.stem.conv1"),
        pyramid_width=len(state["backbone.fpn_lateral2.weight"]),
        pyramid_norm=_infer_norm(state, "backbone.fpn_lateral2"),
    )


def _infer_with_vit(state: dict[str, Tensor]) -> CascadeShape:
    encoder = {name.removeprefix(_ENCODER): state[name] for name in state if name.startswith(_ENCODER)}
    return replace(
        _infer_heads(state),
        backbone="vit",
        encoder=infer_encoder(encoder),
        pyramid_width=len(state["backbone.simfp_4.0.weight"]),
    )


def _infer_heads(state: dict[str, Tensor]) -> CascadeShape:
    """All but the backbone and its pyramid."""
    semantic = "sem_seg_head.predictor.weight"
    return CascadeShape(
        thing_clusters=len(state["roi_heads.box_predictor.0.cls_score.weight"]) - 1,
        stuff_clusters=len(state[semantic]) - 1 if semantic in state else 0,
        box_width=len(state["roi_heads.box_head.0.fc1.weight"]),
        mask_width=len(state["roi_heads.mask_head.mask_fcn1.weight"]),
        is_mask_agnostic=len(state["roi_heads.mask_head.predictor.weight"]) == 1,
        semantic_width=state[semantic].shape[1] if semantic in state else CascadeShape.semantic_width,
    )


def _infer_norm(state: dict[str, Tensor], convolution: str) -> Norm:
    if f"{convolution}.norm.num_batches_tracked" in state:
        return "batch"
    return "frozen" if f"{convolution}.norm.running_mean" in state else "none"
