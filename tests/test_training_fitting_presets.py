from dataclasses import replace

import pytest

from model.errors import ConfigError
from training.__main__ import build_parser
from training.commands.fit import choose_recipe
from training.fitting.cascade.recipe import CascadeRecipe
from training.fitting.presets import plan_recipe
from training.fitting.transformer.recipe import PRESETS, FitConfig


def test_a_preset_is_the_networks_own_with_what_was_given_instead() -> None:
    transformer = plan_recipe("mask_transformer", "tiny", {"steps": 7})
    cascade = plan_recipe("panoptic_cascade", "paper-coco", {"steps": 7, "average_decay": 0.999})
    assert isinstance(transformer, FitConfig)
    assert isinstance(cascade, CascadeRecipe)
    assert (transformer.steps, cascade.steps, cascade.average_decay, cascade.batch) == (7, 7, 0.999, 16)


def test_a_resnet_takes_pixels_unless_told_otherwise() -> None:
    recipe = plan_recipe("panoptic_cascade", "cpu", {"backbone": "resnet50"})
    assert isinstance(recipe, CascadeRecipe)
    assert recipe.inputs == "pixels"
    with pytest.raises(ConfigError, match="features are a ViT's"):
        plan_recipe("panoptic_cascade", "cpu", {"backbone": "resnet50", "inputs": "features"})


def test_presets_and_choices_of_the_other_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask_transformer has no preset 'paper-coco', known are tiny"):
        plan_recipe("mask_transformer", "paper-coco", {})
    with pytest.raises(ConfigError, match="backbone: no choice for a mask_transformer"):
        plan_recipe("mask_transformer", "tiny", {"backbone": "vit"})


@pytest.mark.parametrize(
    "change",
    [
        {"rois": 0}, {"paste_ratio": 1.5}, {"short_sides_px": ()}, {"short_sides_px": (0,)}, {"semantic_stride_px": 2},
        {"pasting": "all"}, {"backbone": "vit-b"}, {"precision": "fp16"}, {"side_px": 100}, {"average_decay": 2.0},
        {"weight_decay": -1.0}, {"warm_up_steps": -1},
    ],
)  # fmt: skip
def test_recipes_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        plan_recipe("panoptic_cascade", "tiny", change)


def test_what_a_preset_switches_on_can_be_switched_off() -> None:
    def choose(*flags: str) -> FitConfig | CascadeRecipe:
        return choose_recipe(build_parser().parse_args(["fit", "STORE", "--out", "RUN", *flags]))

    assert choose() == PRESETS["cpu"]
    assert choose("--no-embeds", "--no-pastes-alike") == replace(PRESETS["cpu"], embeds=False, pastes_alike=False)
    assert choose("--preset", "plain", "--drops-unknown") == replace(PRESETS["plain"], drops_unknown=True)
    with pytest.raises(ConfigError, match="embeds: no choice for a panoptic_cascade"):
        choose("--network", "panoptic_cascade", "--no-embeds")
