"""The sizes of a panoptic cascade, as given or as a state dict shows them."""

from dataclasses import dataclass

from torch import Tensor

from model.errors import CheckpointError, ConfigError
from model.network.resnet import Norm


@dataclass(frozen=True, kw_only=True)
class CascadeShape:
    """Sizes that the weights fix; the defaults are the paper's, but for the clusters."""

    thing_clusters: int
    stuff_clusters: int = 27
    """0: no semantic head, as in CutLER."""
    stem_width: int = 64
    inner_width: int = 64
    """Channels inside the blocks of res2; each stage doubles them."""
    outer_width: int = 256
    """Channels that leave res2; each stage doubles them."""
    backbone_norm: Norm = "batch"
    pyramid_width: int = 256
    pyramid_norm: Norm = "batch"
    box_width: int = 1024
    mask_width: int = 256
    is_mask_agnostic: bool = False
    """One mask for all clusters instead of one for each."""
    semantic_width: int = 128

    def __post_init__(self) -> None:
        if self.thing_clusters < 1 or self.stuff_clusters < 0:
            raise ConfigError(f"{self.thing_clusters} thing and {self.stuff_clusters} stuff clusters: too few")

    @property
    def mask_channels(self) -> int:
        return 1 if self.is_mask_agnostic else self.thing_clusters


def infer_shape(state: dict[str, Tensor]) -> CascadeShape:
    """The shape that a state dict in detectron2's names describes; whether all of it fits is found when it is loaded.

    Raises CheckpointError if a tensor that shows a size is missing.
    """
    try:
        clusters = len(state["roi_heads.box_predictor.0.cls_score.weight"]) - 1
        semantic = "sem_seg_head.predictor.weight"
        return CascadeShape(
            thing_clusters=clusters,
            stuff_clusters=len(state[semantic]) - 1 if semantic in state else 0,
            stem_width=len(state["backbone.bottom_up.stem.conv1.weight"]),
            inner_width=len(state["backbone.bottom_up.res2.0.conv1.weight"]),
            outer_width=len(state["backbone.bottom_up.res2.0.conv3.weight"]),
            backbone_norm=_infer_norm(state, "backbone.bottom_up.stem.conv1"),
            pyramid_width=len(state["backbone.fpn_lateral2.weight"]),
            pyramid_norm=_infer_norm(state, "backbone.fpn_lateral2"),
            box_width=len(state["roi_heads.box_head.0.fc1.weight"]),
            mask_width=len(state["roi_heads.mask_head.mask_fcn1.weight"]),
            is_mask_agnostic=len(state["roi_heads.mask_head.predictor.weight"]) == 1,
            semantic_width=state[semantic].shape[1] if semantic in state else CascadeShape.semantic_width,
        )
    except (KeyError, IndexError, TypeError, ConfigError) as error:
        raise CheckpointError(f"no panoptic cascade in detectron2's names: its tensors do not fit ({error})") from error


def _infer_norm(state: dict[str, Tensor], convolution: str) -> Norm:
    if f"{convolution}.norm.num_batches_tracked" in state:
        return "batch"
    return "frozen" if f"{convolution}.norm.running_mean" in state else "none"
