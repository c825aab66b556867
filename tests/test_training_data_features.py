from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from model.backends.torch_session import load_torch_network
from model.checkpoints.dino import load_encoder
from model.contract import find_bundled_artifact, read_contract
from model.errors import CheckpointError
from model.files import hash_file
from model.networks.interface import normalize
from model.networks.mask_transformer import MaskTransformer
from model.networks.vit import VisionTransformer
from training.data.encoders import fetch_encoder, read_encoder_origin, warn_about_other_encoder
from training.data.features import FeatureStore, compute_key_features
from training.data.label_config import ClusteringConfig
from training.data.photos import scan_photos

CONFIG = ClusteringConfig(side_px=tiny.SIDE_PX)
HASH = "0123456789abcdef" * 4


@pytest.fixture
def encoder(tiny_encoder: Path) -> VisionTransformer:
    return load_encoder(str(tiny_encoder), tiny.SIDE_PX)


def test_keys_are_those_of_the_last_attention_layer(encoder: VisionTransformer) -> None:
    pixels = tiny.draw_noise(2, tiny.SIDE_PX, tiny.SIDE_PX)
    outputs = []
    hook = encoder.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, made: outputs.append(made))
    with torch.inference_mode():
        encoder(normalize(pixels), (encoder.config.depth - 1,))
    hook.remove()
    width = encoder.config.embed_dim
    expected = outputs[0][:, 1:, width : 2 * width].unflatten(1, (4, 4))  # without the class token
    keys = compute_key_features(encoder, pixels)
    assert keys.shape == (2, 1, 4, 4, width)
    assert keys[:, 0].astype(np.float32) == pytest.approx(expected.numpy(), abs=5e-3)  # half precision


def test_cached_features_are_not_computed_again(tmp_path: Path, encoder: VisionTransformer, tiny_photos: Path) -> None:
    photos = scan_photos(tiny_photos).photos
    store = FeatureStore(tmp_path, encoder, HASH, CONFIG)
    store.cache.write(photos[0].digest, np.zeros((4, 4, 4, 64), np.float16))
    store.key_cache.write(photos[1].digest, np.zeros((1, 4, 4, 64), np.float16))
    assert sum(store.fill(photos, with_keys=True)) == len(photos)
    assert [bool(store.load(photo).last_block.any()) for photo in photos[:3]] == [False, True, True]
    assert [bool(store.load_keys(photo).any()) for photo in photos[:3]] == [True, False, True]


def test_layers_outside_the_decoder_s_blocks_get_a_cache_of_their_own(tmp_path: Path, tiny_photos: Path) -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(replace(tiny.SHAPE, depth=8))  # the decoder reads blocks 1, 3, 5 and 7
    torch.nn.init.normal_(encoder.pos_embed)
    photo = scan_photos(tiny_photos).photos[0]
    shared = FeatureStore(tmp_path, encoder, HASH, replace(CONFIG, layers=(5, -1)))
    own = FeatureStore(tmp_path, encoder, HASH, replace(CONFIG, layers=(5, 2)))
    for store in (shared, own):
        assert sum(store.fill([photo])) == 1
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [f"{HASH[:16]}-56", f"{HASH[:16]}-56-blocks-2-5"]
    assert (shared.load(photo).layers[0] == own.load(photo).layers[1]).all()
    assert (shared.load(photo).layers[1] == own.load(photo).last_block).all()
    assert (own.load(photo).layers[0] != own.load(photo).layers[1]).any()


def test_final_tokens_are_the_last_block_after_the_final_norm_where_they_show_the_photo(
    tmp_path: Path, encoder: VisionTransformer, tiny_photos: Path
) -> None:
    store = FeatureStore(tmp_path, encoder, HASH, CONFIG)
    photo = scan_photos(tiny_photos).photos[0]  # 48 x 64 on a square of 56: three of four rows
    assert sum(store.fill([photo])) == 1
    features = store.load(photo)
    assert features.final_tokens().shape == (3, 4, 64)
    with torch.inference_mode():
        expected = encoder.norm(torch.from_numpy(np.asarray(features.last_block, np.float32))).numpy()
    assert features.final_tokens() == pytest.approx(expected[:3], abs=1e-6)


def test_the_bundled_models_encoder_is_written_once_and_is_the_one_that_it_was_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = find_bundled_artifact()
    contract = read_contract(artifact)
    path = fetch_encoder("bundled", tmp_path / "cache")
    network = load_torch_network(contract, artifact)
    assert isinstance(network, MaskTransformer)
    encoder = load_encoder(str(path), contract.input_sizes[0].width_px)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    digest, written = hash_file(path), path.stat().st_mtime_ns
    assert fetch_encoder("bundled", tmp_path / "cache").stat().st_mtime_ns == written
    assert hash_file(fetch_encoder("bundled", tmp_path / "other cache")) == digest
    assert read_encoder_origin(path).endswith(f"; from {contract.name} {contract.version}, {contract.precision}")
    warn_about_other_encoder(artifact, path)
    assert not caplog.messages


def test_a_failed_download_names_the_way_without_internet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth could not be downloaded: .* --encoder bundled"):
        fetch_encoder((tmp_path / "nowhere.pth").as_uri(), tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist$"):
        fetch_encoder(str(tmp_path / "nowhere.pth"), tmp_path / "cache")


def test_weights_of_another_encoder_are_reported(
    tmp_path: Path, tiny_run: Path, tiny_encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_about_other_encoder(tiny_run, tiny_encoder)
    assert not caplog.messages
    state = {name: tensor + torch.randn(tensor.shape) for name, tensor in load_file(tiny_encoder).items()}
    torch.save(state, tmp_path / "other.pth")
    warn_about_other_encoder(tiny_run, tmp_path / "other.pth")
    assert "was trained on another encoder than these labels (other.pth)" in caplog.text
