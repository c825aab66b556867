"""Options and presets for training a panoptic cascade; free of torch, for the command line."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from model.errors import ConfigError
from training.option_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from training.trainer.config import Precision, TrainConfig

CopyPaste = Literal["none", "any", "same-class"]

_SIDE_MULTIPLE_PX = 32


@dataclass(frozen=True, kw_only=True)
class CascadeTrainConfig(TrainConfig):
    """Options for training a panoptic cascade. The defaults are U2Seg's on COCO, by its paper, else by its code.

    Neither has values for copy-paste and DropLoss; these are CutLER's, which the paper cites.
    """

    max_steps: PositiveInt = 90_000
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 5e-5
    clip_per_parameter: bool = True
    precision: Precision = "bf16"
    checkpoint_interval: PositiveInt = 1000
    warmup_steps: NonNegativeInt = 1000
    """Steps with a learning rate that rises linearly, from a thousandth of it."""
    milestones: tuple[int, ...] = ()
    """Steps at which the learning rate is multiplied by `gamma`."""
    gamma: Fraction = 0.02
    """Factor of the learning rate at each milestone."""
    precise_bn_iters: PositiveInt = 200
    """Batches over which the batch-norm statistics of the final weights are averaged (PreciseBN)."""

    backbone: Literal["resnet50", "vit"] = "resnet50"
    """`vit` is the frozen encoder of the labels."""
    cls_agnostic: bool = False
    """Train a single thing cluster and no stuff, as CutLER's detector."""
    cls_agnostic_mask: bool = False
    """Predict one mask for all clusters instead of one for each."""
    stem_out_channels: PositiveInt = 64
    """Channels of ResNet-50's stem."""
    bottleneck_channels: PositiveInt = 64
    """Channels inside the blocks of ResNet-50's stage res2; each stage doubles them."""
    res2_out_channels: PositiveInt = 256
    """Output channels of ResNet-50's stage res2; each stage doubles them."""
    fpn_channels: PositiveInt = 256
    """Channels of the feature pyramid."""
    box_fc_dim: PositiveInt = 1024
    """Width of the box heads."""
    mask_conv_dim: PositiveInt = 256
    """Channels of the mask head."""
    sem_seg_conv_dim: PositiveInt = 128
    """Channels of the semantic head."""

    min_sizes: tuple[PositiveInt, ...] = (240, 320, 480, 640, 672, 704, 736, 768, 800, 1024)
    """Lengths of a photo's shorter side in pixels; one is sampled for each photo."""
    max_size: PositiveInt = 1333
    """Maximum length of the longer side in pixels."""
    side_px: Annotated[int, Parameter(validator=Number(gte=0, modulo=_SIDE_MULTIPLE_PX))] = 0
    """Side of the square input of the exported network, a multiple of 32; 0: the paper's sizes."""
    copy_paste: CopyPaste = "same-class"
    """Paste instances of another photo of the batch: `any` as CutLER, or of clusters that the photo has, as U2Seg."""

    rpn_pre_nms_topk: PositiveInt = 2000
    """Proposals per pyramid level before non-maximum suppression."""
    rpn_post_nms_topk: PositiveInt = 4000
    """Proposals per photo after non-maximum suppression."""
    rpn_batch_size_per_image: PositiveInt = 256
    """Anchors per photo in the RPN loss, at most half of them positive."""
    roi_batch_size_per_image: PositiveInt = 512
    """RoIs per photo in the losses of the heads, at most a quarter of them positive."""
    droploss_iou_threshold: float = 0.01
    """A box with a lower IoU with every label does not train the classifier (DropLoss); negative: off."""
    max_unlabeled_fraction: Fraction = 1.0
    """Boxes with a larger fraction of unlabeled pixels are not negatives; 1: all may be."""
    sem_seg_loss_weight: NonNegativeFloat = 0.5
    """Weight of the semantic loss."""
    sem_seg_loss_stride: Literal[1, 4] = 1
    """1: compute the semantic loss at every pixel, as published; 4: at every fourth in each direction."""

    def __post_init__(self) -> None:
        if not self.min_sizes:
            raise ConfigError("min_sizes must have at least one length")

    def lr_factor(self, step: int) -> float:
        """Return a linear warm-up, and a factor of `gamma` per milestone."""
        factor = self.gamma ** sum(step >= each for each in self.milestones)
        if step >= self.warmup_steps:
            return factor
        progress = step / self.warmup_steps
        return factor * (1e-3 * (1.0 - progress) + progress)


_SMALL = CascadeTrainConfig(
    precision="fp32", batch_size=4, warmup_steps=200, gamma=0.1, checkpoint_interval=100, fpn_channels=128,
    box_fc_dim=256, mask_conv_dim=64, sem_seg_conv_dim=64, cls_agnostic_mask=True, rpn_pre_nms_topk=300,
    rpn_post_nms_topk=500, roi_batch_size_per_image=128, max_unlabeled_fraction=0.5, sem_seg_loss_stride=4,
)  # fmt: skip
"""7 million weights in addition to the encoder's; a checkpoint has 57 MB."""

CASCADE_PRESETS = {
    "u2seg-coco": CascadeTrainConfig(),
    "u2seg-imagenet": CascadeTrainConfig(max_steps=160_000, milestones=(80_000,)),
    "cutler": CascadeTrainConfig(max_steps=160_000, milestones=(80_000,), cls_agnostic=True, copy_paste="any"),
    "gpu": replace(
        _SMALL, backbone="vit", precision="bf16", max_steps=6000, batch_size=16, milestones=(4500, 5500),
        checkpoint_interval=250, min_sizes=(320, 384, 448, 512, 576, 640), max_size=832, side_px=640,
        rpn_pre_nms_topk=1000, rpn_post_nms_topk=1500, roi_batch_size_per_image=256,
    ),
    "tiny": replace(
        _SMALL, max_steps=4, batch_size=2, warmup_steps=2, checkpoint_interval=2, precise_bn_iters=2,
        stem_out_channels=8, bottleneck_channels=4, res2_out_channels=16, fpn_channels=32, box_fc_dim=16,
        mask_conv_dim=8, sem_seg_conv_dim=32, min_sizes=(64, 80), max_size=96, side_px=96, rpn_pre_nms_topk=20,
        rpn_post_nms_topk=40, rpn_batch_size_per_image=32, roi_batch_size_per_image=32,
    ),
}  # fmt: skip
"""Published schedules: `u2seg-coco`, 90,000 steps at one learning rate, as the published checkpoints were made (the
published configuration says 270,000); `u2seg-imagenet`, two epochs; `cutler`, CutLER's first round. Ours: `gpu`, 30
minutes of one large GPU; `tiny`, a smoke test of seconds."""
