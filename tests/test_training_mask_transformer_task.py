"""Training a mask transformer, inference on labeled photos."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SIDE_PX

from model.checkpoints.runs import load_run
from model.errors import ConfigError
from model.images import read_image
from model.networks.mask_transformer import MaskTransformer
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.mask_transformer.crops import full_view
from training.mask_transformer.task import cosine_lr_factor
from training.self_training.teacher import DecoderInput, run_decoder
from training.train import train
from training.trainer.loggers import LOSSES_FILE, read_csv_log

TINY = MASK_TRANSFORMER_PRESETS["tiny"]
PIXELS = replace(
    TINY,
    inputs="pixels",
    crop_prob=1.0,
    copy_paste_prob=1.0,
    target_source="instances",
    droploss=True,
)


@pytest.fixture
def cache(tiny_store: PseudoLabelDataset) -> FeatureCache:
    config = tiny_store.read_config()
    return open_cache(tiny_store.features, config.encoder_hash, config.side_px)


@pytest.fixture
def network(tiny_run: Path) -> MaskTransformer:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    return network


def test_training_on_pixels_needs_no_features_and_is_reproducible(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    for name in ("first", "second"):
        assert train(tiny_store, tmp_path / "missing", tmp_path / name, PIXELS).step == 4
    first = read_csv_log(tmp_path / "first" / LOSSES_FILE)
    assert first == read_csv_log(tmp_path / "second" / LOSSES_FILE)
    load_run(tmp_path / "first")


def test_training_in_bf16_is_close_to_fp32(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    totals = []
    for precision in ("fp32", "bf16"):
        config = replace(PIXELS, max_steps=1, precision=precision)
        train(tiny_store, tmp_path / "missing", tmp_path / precision, config)
        totals.append(read_csv_log(tmp_path / precision / LOSSES_FILE)["total"][0])
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # bf16 has eight bits; matches may differ


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0), ("batch_size", -1), ("warmup_ratio", 1.5), ("copy_paste_prob", -0.1), ("grad_clip_norm", 0.0),
        ("color_jitter", 1.5), ("max_targets", 0),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(TINY, **{field: value})  # type: ignore[arg-type]


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = MaskTransformerTrainConfig(max_steps=100, warmup_ratio=0.1)
    factors = [cosine_lr_factor(step, config) for step in (0, 9, 55, 99)]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=0.01)


def test_a_decoder_on_cached_features_agrees_with_the_network_on_the_photo(
    tiny_store: PseudoLabelDataset, network: MaskTransformer, cache: FeatureCache
) -> None:
    inputs = []
    for photo in tiny_store.read_photos()[:3]:
        image = read_image(photo.path)
        view = full_view(image.height, image.width, SIDE_PX)
        inputs.append(
            DecoderInput(features=view.crop_features(cache.read(photo.digest)), pixels=view.crop_image(image.image))
        )
    output = run_decoder(network.decoder, inputs)
    with torch.inference_mode():
        raw = network(torch.stack([torch.from_numpy(each.pixels) for each in inputs]), torch.full((3, 2), SIDE_PX))
    # The cache holds features in fp16.
    torch.testing.assert_close(output.semantic_logits, raw.semantic, atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.mask_logits.sigmoid(), raw.masks, atol=0.01, rtol=0.0)
    assert (output.semantic_logits[0] - output.semantic_logits[1]).abs().max() > 0.1  # photos differ
