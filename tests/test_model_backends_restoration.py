"""The network of an artifact comes back as it was, or not at all."""

import dataclasses
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from model.backends.restoration import count_flops_of, restore_network
from model.contract import Contract, read_contract
from model.errors import ArtifactError
from model.network.mask_transformer import MaskTransformer
from model.release.graph import round_to_half
from model.run import load_run


@pytest.fixture
def artifact(tmp_path: Path, tiny_artifact: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture
def contract(tiny_artifact: Path) -> Contract:
    return read_contract(tiny_artifact)


def drop(artifact: Path, start: str) -> None:
    """Take the weight whose name begins so out of the graph, and put another name in its place."""
    path = artifact / "network.onnx"
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name.startswith(start))
    tensor.name = "decoder.stranger"
    path.write_bytes(model.SerializeToString())


def test_every_weight_that_an_answer_depends_on_comes_back(
    tiny_artifact: Path, contract: Contract, tiny_run: Path
) -> None:
    _, network = load_run(tiny_run)
    round_to_half(network)
    restored = restore_network(contract, tiny_artifact).state_dict()
    for name, weight in network.state_dict().items():
        if not name.startswith(("encoder.norm.", "decoder.patch_mask.")):
            assert torch.equal(restored[name], weight), name


@pytest.mark.slow
def test_the_cascade_comes_back_with_its_norms_folded(tiny_cascade_artifact: Path) -> None:
    network = restore_network(read_contract(tiny_cascade_artifact), tiny_cascade_artifact)
    assert [name for name in network.state_dict() if "running_mean" in name] == []
    assert not network.training


def test_a_missing_and_an_unexpected_weight_are_named(artifact: Path, contract: Contract) -> None:
    drop(artifact, "decoder.mask_head.0.weight")
    with pytest.raises(ArtifactError, match=r"network\.onnx.*missing decoder\.mask_head\.0\.weight.*export the run"):
        restore_network(contract, artifact)
    with pytest.raises(ArtifactError, match=r"unexpected decoder\.stranger"):
        restore_network(contract, artifact)


def test_a_misshapen_weight_is_named_with_both_shapes(artifact: Path, contract: Contract) -> None:
    settings = {**contract.settings, "decoder": {**contract.settings["decoder"], "queries": 7}}
    with pytest.raises(ArtifactError, match=r"misshapen decoder\.queries: \(1, \d+, \d+\) for \(1, 7, \d+\)"):
        restore_network(dataclasses.replace(contract, settings=settings), artifact)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {}}, "encoder"),
        ({"network": "hydra"}, "no network is called 'hydra'"),
        ({"network": "panoptic_cascade"}, "shape"),
    ],
    ids=["no settings", "unknown network", "another network"],
)
def test_a_contract_that_makes_no_network_is_refused(
    artifact: Path, contract: Contract, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        restore_network(dataclasses.replace(contract, **changes), artifact)  # type: ignore[arg-type]


def test_operations_are_counted_without_weights(contract: Contract, tiny_run: Path) -> None:
    _, network = load_run(tiny_run)
    assert isinstance(network, MaskTransformer)
    # The encoder's matrices alone: 17 tokens, 12 width^2 multiplications each in every block.
    shape = network.encoder.shape
    assert count_flops_of(contract) > 2 * 17 * 12 * shape.width**2 * shape.depth
