"""Recipes by network and name; free of heavy imports, for the command line."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from model.errors import ConfigError
from training.fitting.cascade.recipe import CASCADE_PRESETS, CascadeRecipe
from training.fitting.transformer.recipe import PRESETS, FitConfig

PRESETS_OF: Mapping[str, Mapping[str, FitConfig | CascadeRecipe]] = {
    "mask_transformer": PRESETS,
    "panoptic_cascade": CASCADE_PRESETS,
}


def plan_recipe(network: str, preset: str, given: Mapping[str, Any]) -> FitConfig | CascadeRecipe:
    """The preset with what was given instead.

    Raises ConfigError if the network has no such preset, if the field is another network's, or out of range.
    """
    presets = PRESETS_OF[network]
    if preset not in presets:
        raise ConfigError(f"{network} has no preset {preset!r}, known are {', '.join(presets)}")
    recipe = presets[preset]
    if alien := sorted(set(given) - {entry.name for entry in fields(recipe)}):
        raise ConfigError(f"{', '.join(alien)}: no choice for a {network}")
    if given.get("backbone") == "resnet50":
        given = {"inputs": "pixels", **given}
    return replace(recipe, **given)
