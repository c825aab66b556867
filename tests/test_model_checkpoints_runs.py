"""A run is whole or no run, and tells which of the two networks it holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from model.checkpoints.runs import RunInfo, load_run, read_run_info, write_run
from model.errors import CheckpointError, ConfigError
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade

SHAPE = replace(tiny.CASCADE, backbone_norm="frozen")
VIT_SHAPE = replace(tiny.CASCADE, backbone="vit", encoder=replace(tiny.SHAPE, num_registers=2))
CARD = RunInfo(network="panoptic_cascade", network_config=SHAPE, step=9, provenance={"checkpoint": {"file": "a.pth"}})


@pytest.fixture
def cascade_run(tmp_path: Path) -> Path:
    """A run of a cascade of random weights."""
    torch.manual_seed(0)
    write_run(tmp_path / "run", CARD, PanopticCascade(SHAPE, CascadeInferenceConfig()))
    return tmp_path / "run"


def change_card(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((run / "run.json").read_text())
    change(content)
    (run / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("shape", [SHAPE, VIT_SHAPE], ids=["resnet", "vit"])
def test_a_cascade_comes_back_ready_for_inference(tmp_path: Path, shape: CascadeConfig) -> None:
    torch.manual_seed(0)
    written = PanopticCascade(shape, CascadeInferenceConfig())
    write_run(tmp_path, RunInfo(network="panoptic_cascade", network_config=shape, step=9), written)
    card, network = load_run(tmp_path)
    assert card == RunInfo(network="panoptic_cascade", network_config=shape, step=9)
    assert isinstance(network, PanopticCascade)
    assert (network.inference, network.training) == (CascadeInferenceConfig(), False)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "weights.safetensors"]


@pytest.mark.parametrize("name", ["run.json", "weights.safetensors"])
def test_a_run_without_one_of_its_files_is_refused(cascade_run: Path, name: str) -> None:
    (cascade_run / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_run(cascade_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(format_version=1), "format version 1, this release reads 2: train or import"),
        (lambda info: info.update(network="unet"), "network: input should be 'mask_transformer' or 'pa.* got 'unet'"),
        (lambda info: info.update(stepp=3), "unknown key 'stepp' in RunInfo, did you mean 'step'"),
        (lambda info: info.pop("step"), "missing key 'step' in RunInfo"),
        (lambda info: info.pop("network_config"), "network_config"),
        (lambda info: info.update(network_config=None), "CascadeConfig"),
        (lambda info: info["network_config"].update(box_fc_dmi=3), "'box_fc_dmi' in CascadeConfig, did you mean 'box_"),
        (lambda info: info["network_config"].update(thing_clusters=True), "thing_clusters: .*got True"),
        (lambda info: info["network_config"].update(thing_clusters=0), "0 thing and 2 stuff clusters: expected"),
        (lambda info: info["network_config"].update(encoder={"widht": 64}), "unknown key 'encoder.widht' in "),
        (lambda info: info.update(network="mask_transformer"), "in DecoderConfig"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_run_json_is_named(
    cascade_run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_card(cascade_run, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_run_info(cascade_run)
    assert str(caught.value).startswith(f"{cascade_run / 'run.json'} does not describe a complete run: ")


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_a_run_json_that_is_not_an_object_is_refused(cascade_run: Path, content: str) -> None:
    (cascade_run / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="does not describe a complete run"):
        read_run_info(cascade_run)


def test_weights_of_another_shape_are_named(cascade_run: Path) -> None:
    change_card(cascade_run, lambda card: card["network_config"].update(thing_clusters=4))
    with pytest.raises(
        CheckpointError, match=r"roi_heads\.box_predictor\.0\.cls_score\.weight: .*\[4, 16\].*\[5, 16\]"
    ):
        load_run(cascade_run)


def test_a_network_cannot_have_the_config_of_the_other() -> None:
    with pytest.raises(ConfigError, match="network mask_transformer cannot have a CascadeConfig"):
        RunInfo(network="mask_transformer", network_config=SHAPE, step=0)
