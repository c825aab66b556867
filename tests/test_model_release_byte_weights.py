"""Eight bits a weight on disk, the same numbers in the graph, in torch and after another rounding."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch

from model.backends.onnx_session import OnnxSession, widen
from model.backends.restoration import restore_network
from model.backends.runtime import check_golden, open_session
from model.contract import read_contract
from model.errors import ConfigError
from model.network.mask_transformer import MaskTransformer
from model.release.byte_weights import round_to_bytes
from model.release.export import ExportConfig, export_run
from model.release.graph import round_to_half
from model.run import load_run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    artifact = tmp_path_factory.mktemp("bytes") / "artifact"
    export_run(tiny_run, artifact, ExportConfig(precision="int8-stored", score=0.0, part=0.0), [])
    return artifact


def load_rounded(run: Path) -> MaskTransformer:
    _, network = load_run(run)
    assert isinstance(network, MaskTransformer)
    round_to_half(network)  # as the export does, for what stays fp16
    round_to_bytes(network)
    return network


def test_rounding_moves_a_weight_by_half_a_step_of_its_group_at_most(tiny_run: Path) -> None:
    _, network = load_run(tiny_run)
    before = network.encoder.blocks[0].mlp.fc1.weight.clone().unflatten(1, (-1, 32))
    round_to_bytes(network)
    after = network.encoder.blocks[0].mlp.fc1.weight.unflatten(1, (-1, 32))
    step = before.abs().amax(2, keepdim=True) / 127 * (1 + 2**-11)  # a scale is rounded up to twelve bits
    assert not torch.equal(after, before)
    assert bool(((after - before).abs() <= step / 2 * (1 + 1e-6)).all())


def test_what_was_rounded_stays_as_it_is_and_the_decoder_is_left_alone(tiny_run: Path) -> None:
    network = load_rounded(tiny_run)
    once = {name: weight.clone() for name, weight in network.state_dict().items()}
    round_to_bytes(network)
    assert all(torch.equal(weight, once[name]) for name, weight in network.state_dict().items())
    _, original = load_run(tiny_run)
    round_to_half(original)
    assert all(torch.equal(weight, once[f"decoder.{name}"]) for name, weight in original.decoder.state_dict().items())


def test_a_group_of_zeros_stays_one(tiny_run: Path) -> None:
    _, network = load_run(tiny_run)
    network.encoder.blocks[0].mlp.fc1.weight.data[3, :32] = 0.0
    round_to_bytes(network)
    assert network.encoder.blocks[0].mlp.fc1.weight[3, :32].abs().max() == 0.0
    assert bool(network.encoder.blocks[0].mlp.fc1.weight.isfinite().all())


def test_the_matrices_of_the_encoder_take_a_byte_a_weight(artifact: Path) -> None:
    graph = onnx.load(artifact / "network.onnx").graph
    large = {each.name: each.data_type for each in graph.initializer if np.prod(each.dims) >= 4096}
    matrices = [name for name in large if name.startswith("encoder.blocks.")]
    assert len(matrices) == 4 * tiny.SHAPE.depth  # qkv, projection and the two of the MLP
    assert {large[name] for name in matrices} == {onnx.TensorProto.INT8}
    assert onnx.TensorProto.FLOAT not in large.values()


def test_the_artifact_answers_on_both_backends_and_comes_back_in_torch(artifact: Path, tiny_run: Path) -> None:
    contract, session = open_session(artifact, threads=1)
    assert (contract.precision, session.backend) == ("int8-stored", "cpu")
    assert open_session(artifact, backend="torch", threads=1)[1].backend == "torch"
    restored = restore_network(read_contract(artifact), artifact).state_dict()
    for name, weight in load_rounded(tiny_run).encoder.state_dict().items():
        if name.startswith("blocks.") and weight.ndim > 1:
            assert torch.equal(restored[f"encoder.{name}"], weight), name


def test_widened_it_holds_fp32_and_answers_the_same(tmp_path: Path, artifact: Path) -> None:
    wide = tmp_path / "wide.onnx"
    widen(artifact / "network.onnx", wide)
    weights = [each for each in onnx.load(wide).graph.initializer if np.prod(each.dims) >= 4096]
    assert {each.data_type for each in weights} == {onnx.TensorProto.FLOAT}
    check_golden(OnnxSession(wide, threads=1), artifact / "golden.npz")


def test_a_cascade_has_no_encoder_to_round(tmp_path: Path, tiny_cascade_run: Path) -> None:
    config = ExportConfig(precision="int8-stored", canvases=tiny.CANVASES[:1])
    with pytest.raises(ConfigError, match="no frozen encoder"):
        export_run(tiny_cascade_run, tmp_path / "artifact", config, [])
    assert list(tmp_path.iterdir()) == []
