"""fp16 graphs compute only safe operators in fp16; int8 storage keeps outputs equal."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto

from model.backends.loader import check_golden, load_session
from model.backends.onnx_runtime import OnnxSession, materialize_fp32
from model.backends.parity import FP16_TOLERANCE, require_equal_outputs
from model.backends.torch_session import load_torch_network
from model.checkpoints.runs import load_run
from model.contract import InputSize, read_contract
from model.errors import ConfigError
from model.export.export import ExportConfig, draw_scene, export_run
from model.export.onnx_graph import round_to_fp16, write_graph
from model.export.parity_checks import stack_images
from model.export.precision import FP16_FOLLOWING_OPERATORS, FP16_OPERATORS, round_to_int8
from model.networks.mask_transformer import MaskTransformer
from model.networks.panoptic_cascade import PanopticCascade, fold_batch_norms

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
EXACT = {
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "RoiAlign", "TopK", "Exp", "Clip",
    "Min", "Max", "Sub", "Sigmoid", "Greater", "Where", "GatherElements",
}  # fmt: skip


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> dict[str, Path]:
    """Graphs of the tiny mask transformer, by precision."""
    _, network = load_run(tiny_run)
    assert isinstance(network, MaskTransformer)
    round_to_fp16(network)
    folder = tmp_path_factory.mktemp("graphs")
    for precision in ("fp32", "fp16"):
        write_graph(network, [InputSize.square(tiny.SIDE_PX)], precision, folder / f"{precision}.onnx")  # type: ignore[arg-type]
    return {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16")}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory, tiny_cascade_run: Path) -> Path:
    """Graph of the tiny cascade in fp16."""
    _, network = load_run(tiny_cascade_run)
    assert isinstance(network, PanopticCascade)
    path = tmp_path_factory.mktemp("graphs") / "cascade.onnx"
    write_graph(fold_batch_norms(network), [InputSize.square(96)], "fp16", path)
    return path


def list_types(path: Path) -> dict[str, set[int]]:
    """Float types of the inputs of each operator, except scales of Resize."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = defaultdict(set)
    for node in model.graph.node:
        names = node.input[:1] if node.op_type == "Resize" else node.input
        given = {types[name] for name in names if name} & FLOATS
        assert len(given) <= 1, f"{node.name} mixes types"
        found[node.op_type] |= given
    return found


def test_products_are_fp16_and_norms_softmax_and_boxes_fp32_in_the_transformer(transformer: dict[str, Path]) -> None:
    types = list_types(transformer["fp16"])
    assert [types[kind] for kind in ("Conv", "ConvTranspose")] == [{TensorProto.FLOAT16}] * 2
    # Scores count the cells of masks in products; these stay exact.
    assert [types[kind] for kind in ("Einsum", "MatMul")] == [FLOATS] * 2
    exact = EXACT & set(types)
    assert {"LayerNormalization", "InstanceNormalization", "Softmax"} <= exact
    assert [kind for kind in exact if TensorProto.FLOAT16 in types[kind]] == []


@pytest.mark.slow
def test_products_are_fp16_and_norms_softmax_and_boxes_fp32_in_the_cascade(cascade: Path) -> None:
    output = OnnxSession(cascade, threads=1).run(*stack_images([draw_scene(0, InputSize.square(96))]))[0]
    assert all(np.isfinite(value).all() for value in vars(output).values() if value is not None)
    types = list_types(cascade)
    assert types["Conv"] == types["ConvTranspose"] == {TensorProto.FLOAT16}
    halved = {kind for kind, given in types.items() if TensorProto.FLOAT16 in given}
    assert halved <= FP16_OPERATORS | FP16_FOLLOWING_OPERATORS | {"Cast"}
    assert {"RoiAlign", "TopK", "Softmax", "InstanceNormalization", "Exp"} <= set(types) - halved
    # Suppression adds up yes and no in products; these stay exact.
    assert types["MatMul"] == FLOATS


def test_fp16_outputs_are_within_the_tolerance(transformer: dict[str, Path]) -> None:
    scenes = stack_images([draw_scene(seed, InputSize.square(tiny.SIDE_PX)) for seed in range(3)])
    exact, session = (OnnxSession(transformer[precision], threads=1) for precision in ("fp32", "fp16"))
    expected, given = exact.run(*scenes), session.run(*scenes)
    assert [value.dtype for value in vars(given[0]).values() if value is not None] == [
        value.dtype for value in vars(expected[0]).values() if value is not None
    ]
    assert not np.array_equal(expected[0].semantic, given[0].semantic)
    require_equal_outputs(expected, given, "fp16", FP16_TOLERANCE)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    artifact = tmp_path_factory.mktemp("bytes") / "artifact"
    export_run(
        tiny_run,
        artifact,
        ExportConfig(precision="int8-stored", score_threshold=0.0, min_component_area_fraction=0.0),
        [],
    )
    return artifact


def load_rounded(run: Path) -> MaskTransformer:
    _, network = load_run(run)
    assert isinstance(network, MaskTransformer)
    round_to_fp16(network)  # as the export does, for what stays fp16
    round_to_int8(network)
    return network


def test_rounding_changes_a_weight_by_at_most_half_a_step(tiny_run: Path) -> None:
    _, network = load_run(tiny_run)
    network.encoder.blocks[0].mlp.fc1.weight.data[3, :32] = 0.0  # a group of zeros
    before = network.encoder.blocks[0].mlp.fc1.weight.clone().unflatten(1, (-1, 32))
    round_to_int8(network)
    after = network.encoder.blocks[0].mlp.fc1.weight.unflatten(1, (-1, 32))
    step = before.abs().amax(2, keepdim=True) / 127 * (1 + 2**-11)  # a scale is rounded up to twelve bits
    assert not torch.equal(after, before)
    assert bool(((after - before).abs() <= step / 2 * (1 + 1e-6)).all())


def test_rounding_again_changes_nothing_and_the_decoder_is_not_rounded(tiny_run: Path) -> None:
    network = load_rounded(tiny_run)
    once = {name: weight.clone() for name, weight in network.state_dict().items()}
    round_to_int8(network)
    assert all(torch.equal(weight, once[name]) for name, weight in network.state_dict().items())
    _, original = load_run(tiny_run)
    round_to_fp16(original)
    assert all(torch.equal(weight, once[f"decoder.{name}"]) for name, weight in original.decoder.state_dict().items())


def test_encoder_matrices_are_stored_as_int8(artifact: Path) -> None:
    graph = onnx.load(artifact / "network.onnx").graph
    large = {each.name: each.data_type for each in graph.initializer if np.prod(each.dims) >= 4096}
    matrices = [name for name in large if name.startswith("encoder.blocks.")]
    assert len(matrices) == 4 * tiny.SHAPE.depth  # qkv, projection and the two of the MLP
    assert {large[name] for name in matrices} == {onnx.TensorProto.INT8}
    assert onnx.TensorProto.FLOAT not in large.values()


def test_an_int8_stored_artifact_runs_on_all_backends(artifact: Path, tiny_run: Path) -> None:
    contract, session = load_session(artifact, threads=1)
    assert (contract.precision, session.backend) == ("int8-stored", "cpu")
    assert load_session(artifact, backend="torch", threads=1)[1].backend == "torch"
    restored = load_torch_network(read_contract(artifact), artifact).state_dict()
    for name, weight in load_rounded(tiny_run).encoder.state_dict().items():
        if name.startswith("blocks.") and weight.ndim > 1:
            assert torch.equal(restored[f"encoder.{name}"], weight), name


def test_materialized_weights_are_fp32_with_equal_outputs(tmp_path: Path, artifact: Path) -> None:
    wide = tmp_path / "wide.onnx"
    materialize_fp32(artifact / "network.onnx", wide)
    weights = [each for each in onnx.load(wide).graph.initializer if np.prod(each.dims) >= 4096]
    assert {each.data_type for each in weights} == {onnx.TensorProto.FLOAT}
    check_golden(OnnxSession(wide, threads=1), artifact / "golden.npz")


def test_a_cascade_has_no_frozen_encoder_to_round(tmp_path: Path, tiny_cascade_run: Path) -> None:
    config = ExportConfig(precision="int8-stored", input_sizes=tiny.INPUT_SIZES[:1])
    with pytest.raises(ConfigError, match="needs a frozen encoder"):
        export_run(tiny_cascade_run, tmp_path / "artifact", config, [])
    assert list(tmp_path.iterdir()) == []
