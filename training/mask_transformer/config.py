"""Options and presets for training a mask transformer; free of torch, for the command line."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from training.option_types import Fraction, PositiveInt
from training.trainer.config import InputKind, TrainConfig


@dataclass(frozen=True, kw_only=True)
class MaskTransformerTrainConfig(TrainConfig):
    """Options for training a mask transformer. The defaults are those of the bundled model: an hour on two cores."""

    ema_decay: Fraction = 0.999
    inputs: InputKind = "features"
    """`features` are computed once by the frozen encoder and cached; with `pixels` the encoder runs in every step,
    on augmented photos, which needs a GPU."""
    warmup_ratio: Fraction = 0.05
    """Fraction of the steps with a linearly rising learning rate; a cosine decay to 0 follows."""
    num_queries: PositiveInt = 64
    """Queries of the decoder: the maximum number of instances in a photo."""
    num_decoder_layers: PositiveInt = 3
    """Transformer blocks of the decoder."""
    copy_paste_prob: Fraction = 0.7
    """Fraction of the samples that get instances of another photo pasted in."""
    copy_paste_same_class: bool = True
    """Paste only instances of clusters that the sample has, if another photo has such."""
    crop_prob: Fraction = 0.25
    """Fraction of the samples that show a crop of the photo, enlarged, instead of all of it."""
    color_jitter: Fraction = 0.4
    """Maximum relative change of brightness, contrast and saturation; only with `--inputs pixels`."""
    target_source: Literal["panoptic", "instances"] = "instances"
    """Instance targets: `instances` are the whole masks of the labels, weighted by their scores; `panoptic` are the
    visible segments of the panoptic maps, all of weight 1."""
    max_targets: PositiveInt = 30
    """Maximum number of instance masks per photo, best scores first; only with `--target-source instances`."""
    no_object_from_score: Fraction = 1.0
    """Weight of the no-object class for low-score labels, 0..1: at 1, a label of score s is trained as a fraction s
    object and 1 - s no-object; at 0, its loss is only scaled by s."""
    droploss: bool = True
    """Do not train an unmatched query as no-object if more than half of its mask is unlabeled (CutLER's DropLoss)."""

    def lr_factor(self, step: int) -> float:
        """Return a linear warm-up, then half a cosine."""
        warmup = max(1, round(self.warmup_ratio * self.max_steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, self.max_steps - warmup)))


_PANOPTIC_TARGETS = MaskTransformerTrainConfig(
    ema_decay=0.0,
    copy_paste_same_class=False,
    crop_prob=0.0,
    target_source="panoptic",
    no_object_from_score=0.0,
    droploss=False,
)

MASK_TRANSFORMER_PRESETS = {
    "cpu": MaskTransformerTrainConfig(),
    "gpu": MaskTransformerTrainConfig(
        inputs="pixels", batch_size=64, max_steps=4000, precision="bf16", crop_prob=1.0, no_object_from_score=0.0
    ),
    "panoptic-targets": _PANOPTIC_TARGETS,
    "tiny": replace(
        _PANOPTIC_TARGETS, max_steps=4, batch_size=2, num_queries=8, num_decoder_layers=1, checkpoint_interval=2
    ),
}
"""`cpu`: as the bundled model. `gpu`: the same on one large GPU, from pixels. `panoptic-targets`: only the visible
segments of the panoptic maps, all alike. `tiny`: a smoke test of seconds."""


_PUBLISHED_STEPS = {
    0.01: 3600, 0.02: 3600, 0.05: 4500, 0.1: 9000, 0.2: 18_000, 0.3: 27_000, 0.4: 36_000, 0.5: 45_000,
}  # fmt: skip
"""Steps with 16 images for each fraction of COCO train2017 (U2Seg_eff, COCO-PanopticSegmentation/efficiency_*)."""


def finetune_config(fraction: float, config: MaskTransformerTrainConfig) -> MaskTransformerTrainConfig:
    """Adapt a configuration to human labels, with the published number of steps for the next larger fraction.

    Human labels are certain and complete: every one gets the full weight. Unlike in U2Seg_eff, the learning rate
    follows a cosine. A fraction above one half gets the steps of one half.
    """
    listed = min((each for each in _PUBLISHED_STEPS if each >= fraction), default=max(_PUBLISHED_STEPS))
    return replace(
        config,
        max_steps=_PUBLISHED_STEPS[listed],
        target_source="panoptic",
        no_object_from_score=0.0,
        droploss=False,
    )
