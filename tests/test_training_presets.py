from dataclasses import replace

import pytest

from model.errors import ConfigError
from training.__main__ import build_parser
from training.commands.fit import choose_recipe
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.panoptic_cascade.config import CascadeTrainConfig
from training.presets import make_train_config


def test_a_preset_is_the_networks_own_with_what_was_given_instead() -> None:
    transformer = make_train_config("mask_transformer", "tiny", {"steps": 7})
    cascade = make_train_config("panoptic_cascade", "paper-coco", {"steps": 7, "average_decay": 0.999})
    assert isinstance(transformer, MaskTransformerTrainConfig)
    assert isinstance(cascade, CascadeTrainConfig)
    assert (transformer.steps, cascade.steps, cascade.average_decay, cascade.batch) == (7, 7, 0.999, 16)


def test_a_resnet_takes_pixels_unless_told_otherwise() -> None:
    recipe = make_train_config("panoptic_cascade", "cpu", {"backbone": "resnet50"})
    assert isinstance(recipe, CascadeTrainConfig)
    assert recipe.inputs == "pixels"
    with pytest.raises(ConfigError, match="features are a ViT's"):
        make_train_config("panoptic_cascade", "cpu", {"backbone": "resnet50", "inputs": "features"})


def test_presets_and_choices_of_the_other_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask_transformer has no preset 'paper-coco', known are tiny"):
        make_train_config("mask_transformer", "paper-coco", {})
    with pytest.raises(ConfigError, match="backbone: no choice for a mask_transformer"):
        make_train_config("mask_transformer", "tiny", {"backbone": "vit"})


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
        make_train_config("panoptic_cascade", "tiny", change)


def test_what_a_preset_switches_on_can_be_switched_off() -> None:
    def choose(*flags: str) -> MaskTransformerTrainConfig | CascadeTrainConfig:
        return choose_recipe(build_parser().parse_args(["fit", "STORE", "--out", "RUN", *flags]))

    assert choose() == MASK_TRANSFORMER_PRESETS["cpu"]
    assert choose("--no-embeds", "--no-pastes-alike") == replace(
        MASK_TRANSFORMER_PRESETS["cpu"], embeds=False, pastes_alike=False
    )
    assert choose("--preset", "plain", "--drops-unknown") == replace(
        MASK_TRANSFORMER_PRESETS["plain"], drops_unknown=True
    )
    with pytest.raises(ConfigError, match="embeds: no choice for a panoptic_cascade"):
        choose("--network", "panoptic_cascade", "--no-embeds")
