from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.contract import read_contract
from model.errors import ConfigError
from model.network.mask_transformer import MaskDecoder
from model.run import load_run
from training.fitting.loop.warm_start import warm_start


def test_an_artifact_starts_a_fit_as_its_run_does_but_for_rounding(tiny_run: Path, tiny_artifact: Path) -> None:
    card, network = load_run(tiny_run)
    decoders = [MaskDecoder(network.decoder.shape, network.encoder.shape) for _ in range(2)]
    first = warm_start(decoders[0], "mask_transformer", tiny_run)
    second = warm_start(decoders[1], "mask_transformer", tiny_artifact)
    assert first.drawn == ()
    assert {name.split(".")[0] for name in second.drawn} == {"patch_mask"}  # which training alone uses
    assert second.step == first.step == card.step
    assert second.sha256 == read_contract(tiny_artifact).files["network.onnx"]
    states = [decoder.state_dict() for decoder in decoders]
    for name in set(states[0]) - set(second.drawn):
        # stored as fp16: eleven bits
        torch.testing.assert_close(states[1][name], states[0][name], rtol=2**-11, atol=2**-24)


def test_an_artifact_of_another_network_or_of_int8_is_no_start(tmp_path: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ConfigError, match="is a mask_transformer: a panoptic_cascade cannot start from it"):
        warm_start(torch.nn.Linear(1, 1), "panoptic_cascade", tiny_artifact)
    contract = read_contract(tiny_artifact)
    files = {name: contract.files["golden.npz"] for name in ("network.xml", "network.bin", "golden.npz")}
    for name in files:
        (tmp_path / name).write_bytes((tiny_artifact / "golden.npz").read_bytes())
    replace(contract, precision="int8", files=files).write(tmp_path)
    with pytest.raises(ConfigError, match="is of int8, which no fit starts from"):
        warm_start(torch.nn.Linear(1, 1), "mask_transformer", tmp_path)
