"""Encoder files: the bundled model's, failed downloads, and weights that belong to another encoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.backends.onnx_to_torch import load_torch_network
from model.checkpoints.dino import load_encoder
from model.contract import find_bundled_artifact, read_contract
from model.errors import CheckpointError
from model.files import hash_file
from model.networks.mask_transformer import MaskTransformer
from training.data.encoders import fetch_encoder, read_encoder_origin, warn_about_other_encoder


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
