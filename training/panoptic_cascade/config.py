"""How the paper's network is fitted; free of heavy imports, for the command line."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.errors import ConfigError
from training.trainer.config import InputKind, TrainConfig

Backbone = Literal["resnet50", "vit"]
CopyPaste = Literal["none", "any", "semantic"]

_SIDE_MULTIPLE_PX = 32


@dataclass(frozen=True, kw_only=True)
class CascadeTrainConfig(TrainConfig):
    """The defaults are U2Seg's on COCO, by its paper and, where that is silent, by its code.

    Neither has numbers for copy-paste and DropLoss: those are CutLER's, which the paper names.
    """

    steps: int = 90_000
    batch: int = 16
    learning_rate: float = 0.01
    weight_decay: float = 5e-5
    """Not of norms."""
    is_clipped_each: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    checkpoint_every: int = 1000
    momentum: float = 0.9
    warm_up_steps: int = 1000
    """Over which the learning rate rises in a line."""
    warm_up_share: float = 1e-3
    """Of the learning rate, at the first step."""
    milestones: tuple[int, ...] = ()
    """Steps from which on the learning rate is multiplied by `milestone_factor`, once more at each."""
    milestone_factor: float = 0.02
    precise_batches: int = 200
    """After the last step the statistics of batch norms are those of so many batches (PreciseBN)."""

    backbone: Backbone = "resnet50"
    inputs: InputKind = "pixels"
    """`features`: what the labels' encoder made of the photos, from the cache; for a ViT, which stays as it is."""
    is_agnostic: bool = False
    """One thing cluster and no stuff, as CutLER's detector."""
    cls_agnostic_mask: bool = False
    """One mask for all clusters instead of one for each."""
    stem_out_channels: int = 64
    bottleneck_channels: int = 64
    res2_out_channels: int = 256
    fpn_channels: int = 256
    box_fc_dim: int = 1024
    mask_conv_dim: int = 256
    sem_seg_conv_dim: int = 128

    short_sides_px: tuple[int, ...] = (240, 320, 480, 640, 672, 704, 736, 768, 800, 1024)
    """One is drawn for each photo."""
    longest_side_px: int = 1333
    side_px: int = 0
    """Of the square on which the run answers, a multiple of 32; 0: that of cached features, else the paper's sizes."""
    pasting: CopyPaste = "semantic"
    """Objects of another photo of the batch: `any`, as CutLER, or of clusters that the photo has, as U2Seg."""
    paste_ratio: float = 0.3
    """Pasted photos have this share of the sides at least, and at most all."""

    proposals_per_level: int = 2000
    proposals: int = 4000
    anchors: int = 256
    """Of a photo, that the proposals' loss is measured on; at most half of them on objects."""
    rois: int = 512
    """Of a photo, that the heads learn from; at most a quarter of them on objects."""
    drop_iou: float = 0.01
    """DropLoss: a box that overlaps no label beyond this IoU teaches no cluster; below 0 there is none such."""
    ignored_share: float = 1.0
    """Boxes of which more than this lies where there is no label are no examples of "nothing"; 1: all are."""
    semantic_weight: float = 0.5
    semantic_stride_px: int = 1
    """1: stuff is compared in every pixel, as published; 4: in every cell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive(
            "proposals_per_level",
            "proposals",
            "anchors",
            "rois",
            "longest_side_px",
            "precise_batches",
            "fpn_channels",
            "box_fc_dim",
            "mask_conv_dim",
            "sem_seg_conv_dim",
            "stem_out_channels",
            "bottleneck_channels",
            "res2_out_channels",
        )
        self._require_not_negative("warm_up_steps", "semantic_weight")
        self._require_shares("momentum", "warm_up_share", "milestone_factor", "paste_ratio", "ignored_share")
        if not self.short_sides_px or min(self.short_sides_px) < 1:
            raise ConfigError(f"short_sides_px must be one or more lengths, got {self.short_sides_px}")
        if self.side_px < 0 or self.side_px % _SIDE_MULTIPLE_PX:
            raise ConfigError(f"side_px must be a multiple of {_SIDE_MULTIPLE_PX}, got {self.side_px}")
        if self.semantic_stride_px not in (1, 4):
            raise ConfigError(f"semantic_stride_px must be 1 or 4, got {self.semantic_stride_px}")
        for name, words in (("backbone", Backbone), ("inputs", InputKind), ("pasting", CopyPaste)):
            if getattr(self, name) not in get_args(words):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(words))}, got {getattr(self, name)!r}")
        if self.inputs == "features" and self.backbone != "vit":
            raise ConfigError(f"features are a ViT's: a {self.backbone} takes pixels")


_SMALL = CascadeTrainConfig(
    precision="fp32",
    batch=4,
    warm_up_steps=200,
    milestone_factor=0.1,
    checkpoint_every=100,
    fpn_channels=128,
    box_fc_dim=256,
    mask_conv_dim=64,
    sem_seg_conv_dim=64,
    cls_agnostic_mask=True,
    proposals_per_level=300,
    proposals=500,
    rois=128,
    ignored_share=0.5,
    semantic_stride_px=4,
)
"""7 million weights beside the encoder's: a checkpoint has 57 MB."""

CASCADE_PRESETS = {
    "tiny": replace(
        _SMALL,
        steps=4,
        batch=2,
        warm_up_steps=2,
        checkpoint_every=2,
        precise_batches=2,
        stem_out_channels=8,
        bottleneck_channels=4,
        res2_out_channels=16,
        fpn_channels=32,
        box_fc_dim=16,
        mask_conv_dim=8,
        sem_seg_conv_dim=32,
        short_sides_px=(64, 80),
        longest_side_px=96,
        side_px=96,
        proposals_per_level=20,
        proposals=40,
        anchors=32,
        rois=32,
    ),
    "cpu": replace(_SMALL, backbone="vit", inputs="features", steps=4000, milestones=(3000,)),
    "gpu": replace(
        _SMALL,
        backbone="vit",
        precision="bf16",
        steps=6000,
        batch=16,
        milestones=(4500, 5500),
        checkpoint_every=250,
        short_sides_px=(320, 384, 448, 512, 576, 640),
        longest_side_px=832,
        side_px=640,
        proposals_per_level=1000,
        proposals=1500,
        rois=256,
    ),
    "paper-coco": CascadeTrainConfig(),
    "paper-imagenet": CascadeTrainConfig(steps=160_000, milestones=(80_000,)),
    "paper-cutler": CascadeTrainConfig(steps=160_000, milestones=(80_000,), is_agnostic=True, pasting="any"),
}
"""`tiny` shows that everything turns; `cpu` takes three hours on two cores, `gpu` is meant for 30 minutes of one large
GPU, in slices (`--minutes`).

The others are published schedules: U2Seg on COCO, 90,000 steps at one learning rate, as the published checkpoints
were made (its file of settings says 270,000); U2Seg on ImageNet, two epochs; CutLER's first round.
"""
