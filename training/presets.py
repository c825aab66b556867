"""Recipes by network and name; free of heavy imports, for the command line."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from model.errors import ConfigError
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig

NETWORK_PRESETS: Mapping[str, Mapping[str, MaskTransformerTrainConfig | CascadeTrainConfig]] = {
    "mask_transformer": MASK_TRANSFORMER_PRESETS,
    "panoptic_cascade": CASCADE_PRESETS,
}


def make_train_config(
    network: str, preset: str, given: Mapping[str, Any]
) -> MaskTransformerTrainConfig | CascadeTrainConfig:
    """The preset with what was given instead.

    Raises ConfigError if the network has no such preset, if the field is another network's, or out of range.
    """
    presets = NETWORK_PRESETS[network]
    if preset not in presets:
        raise ConfigError(f"{network} has no preset {preset!r}, known are {', '.join(presets)}")
    recipe = presets[preset]
    if alien := sorted(set(given) - {entry.name for entry in fields(recipe)}):
        raise ConfigError(f"{', '.join(alien)}: no choice for a {network}")
    if given.get("backbone") == "resnet50":
        given = {"inputs": "pixels", **given}
    return replace(recipe, **given)


PUBLISHED_STEPS = {
    0.01: 3600, 0.02: 3600, 0.05: 4500, 0.1: 9000, 0.2: 18_000, 0.3: 27_000, 0.4: 36_000, 0.5: 45_000,
}  # fmt: skip
"""Iterations of 16 pictures for a share of COCO train2017 (U2Seg_eff, COCO-PanopticSegmentation/efficiency_*)."""


def finetune_config(fraction: float, recipe: MaskTransformerTrainConfig) -> MaskTransformerTrainConfig:
    """The recipe with the published number of steps of the next larger share; beyond the half, that of the half.

    Unlike there the learning rate falls as a cosine, as in the fit before. Labels of people are sure and whole.
    """
    recipe = replace(recipe, targets="merged", doubt=0.0, drops_unknown=False, embeds=False)
    listed = min((share for share in PUBLISHED_STEPS if share >= fraction), default=max(PUBLISHED_STEPS))
    return replace(recipe, steps=PUBLISHED_STEPS[listed])
