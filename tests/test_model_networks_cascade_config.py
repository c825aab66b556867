"""The sizes of a panoptic cascade are inferred from its state dict, or the state dict is refused."""

from dataclasses import replace

import pytest
import torch

from model.errors import CheckpointError, ConfigError
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade, infer_cascade_config
from model.networks.vit import EncoderConfig

HEADS = {
    "thing_clusters": 3, "stuff_clusters": 2, "fpn_channels": 10, "box_fc_dim": 12, "mask_conv_dim": 14,
    "sem_seg_conv_dim": 32,
}  # fmt: skip
SMALL = CascadeConfig(stem_out_channels=4, bottleneck_channels=6, res2_out_channels=8, **HEADS)  # type: ignore[arg-type]
ENCODER = EncoderConfig(embed_dim=64, depth=2, patch_px=14, grid_size=5, num_registers=1, has_layer_scale=True)
WITH_VIT = CascadeConfig(backbone="vit", encoder=ENCODER, **HEADS)  # type: ignore[arg-type]


def draw_state(config: CascadeConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return PanopticCascade(config, CascadeInferenceConfig()).state_dict()


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, cls_agnostic_mask=True),
        replace(SMALL, backbone_norm="frozen", fpn_norm="none"),
        replace(SMALL, stuff_clusters=0, sem_seg_conv_dim=128),
        CascadeConfig(thing_clusters=800),
        WITH_VIT,
        replace(WITH_VIT, encoder=replace(ENCODER, patch_px=16, num_registers=0, has_layer_scale=False)),
    ],
)
def test_the_cascade_config_is_inferred_from_its_weights(config: CascadeConfig) -> None:
    assert infer_cascade_config(draw_state(config)) == config


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SMALL, "roi_heads.box_head.0.fc1.weight"),
        (SMALL, "backbone.fpn_lateral2.weight"),
        (WITH_VIT, "backbone.net.patch_embed.proj.weight"),
        (WITH_VIT, "backbone.simfp_4.0.weight"),
    ],
)
def test_a_missing_tensor_that_defines_a_size_is_named(config: CascadeConfig, name: str) -> None:
    state = draw_state(config)
    del state[name]
    with pytest.raises(CheckpointError, match=name.removeprefix("backbone.net.")):
        infer_cascade_config(state)


def test_a_state_dict_without_clusters_is_refused() -> None:
    state = draw_state(SMALL)
    state["roi_heads.box_predictor.0.cls_score.weight"] = torch.zeros(1, 12)
    with pytest.raises(CheckpointError, match="0 thing"):
        infer_cascade_config(state)
    with pytest.raises(ConfigError):
        CascadeConfig(thing_clusters=1, stuff_clusters=-1)


def test_a_vit_backbone_needs_an_encoder_and_a_resnet_has_none() -> None:
    with pytest.raises(ConfigError, match="only a ViT has an encoder"):
        replace(WITH_VIT, encoder=None)
    with pytest.raises(ConfigError, match="only a ViT has an encoder"):
        replace(SMALL, encoder=ENCODER)
    with pytest.raises(ConfigError, match="multiple of 64"):
        replace(WITH_VIT, encoder=replace(ENCODER, embed_dim=100))
