"""A graph in fp16 computes products so, and nothing that would suffer from it."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper

from model.backends.onnx_session import OnnxSession
from model.backends.parity import FP16, compare, decide
from model.contract import Canvas
from model.network.fold import fold_norms
from model.network.mask_transformer import MaskTransformer
from model.network.panoptic_cascade import PanopticCascade
from model.release.export import draw_scene
from model.release.gate import stack
from model.release.graph import round_to_half, write_graph
from model.release.half_graph import FOLLOWING, HEAVY, compute_in_half
from model.run import load_run

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
EXACT = {
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "RoiAlign", "TopK", "Exp", "Clip",
    "Min", "Max", "Sub", "Sigmoid", "Greater", "Where", "GatherElements",
}  # fmt: skip


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> dict[str, Path]:
    """The graphs of the tiny mask transformer, by precision."""
    _, network = load_run(tiny_run)
    assert isinstance(network, MaskTransformer)
    round_to_half(network)
    folder = tmp_path_factory.mktemp("graphs")
    for precision in ("fp32", "fp16"):
        write_graph(network, [Canvas.square(tiny.SIDE_PX)], precision, folder / f"{precision}.onnx")  # type: ignore[arg-type]
    return {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16")}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory, tiny_cascade_run: Path) -> Path:
    """The tiny cascade's graph in fp16."""
    _, network = load_run(tiny_cascade_run)
    assert isinstance(network, PanopticCascade)
    path = tmp_path_factory.mktemp("graphs") / "cascade.onnx"
    write_graph(fold_norms(network), [Canvas.square(96)], "fp16", path)
    return path


def list_types(path: Path) -> dict[str, set[int]]:
    """The floating-point types that nodes of each kind are given, scales of Resize aside."""
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
    types = list_types(cascade)
    assert types["Conv"] == types["ConvTranspose"] == {TensorProto.FLOAT16}
    halved = {kind for kind, given in types.items() if TensorProto.FLOAT16 in given}
    assert halved <= HEAVY | FOLLOWING | {"Cast"}
    assert {"RoiAlign", "TopK", "Softmax", "InstanceNormalization", "Exp"} <= set(types) - halved
    # Suppression adds up yes and no in products; these stay exact.
    assert types["MatMul"] == FLOATS


@pytest.mark.slow
def test_inputs_and_outputs_keep_their_types(transformer: dict[str, Path], cascade: Path) -> None:
    for path in (transformer["fp16"], cascade):
        graph = onnx.load(path).graph
        assert [each.type.tensor_type.elem_type for each in graph.input] == [TensorProto.UINT8, TensorProto.INT64]
        assert [each.type.tensor_type.elem_type for each in graph.output] == [
            TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT,
        ]  # fmt: skip


def test_onnx_runtime_answers_within_the_tolerance_of_fp16(transformer: dict[str, Path]) -> None:
    scenes = stack([draw_scene(seed, Canvas.square(tiny.SIDE_PX)) for seed in range(3)])
    exact, session = (OnnxSession(transformer[precision], threads=1) for precision in ("fp32", "fp16"))
    expected, given = exact.run(*scenes), session.run(*scenes)
    assert not np.array_equal(expected[0].semantic, given[0].semantic)
    compare(decide(expected), decide(given), FP16).require("fp16", FP16)


@pytest.mark.slow
def test_the_cascade_runs_in_fp16(cascade: Path) -> None:
    answer = OnnxSession(cascade, threads=1).run(*stack([draw_scene(0, Canvas.square(96))]))[0]
    assert all(np.isfinite(value).all() for value in vars(answer).values())


def make_model(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """A graph from x [2, 2] to y [2, 2]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    return onnx.shape_inference.infer_shapes(model)


def list_kinds(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Every node's kind and the type of its first input."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.input]}
    return ((node.op_type, types[node.input[0]]) for node in model.graph.node)


def test_what_lies_between_two_products_needs_no_cast() -> None:
    weight = np.eye(2, dtype=np.float32)
    model = make_model(
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
        w=weight,
    )
    compute_in_half(model, "_fp16")
    assert list(list_kinds(model)) == [
        ("Cast", TensorProto.FLOAT),
        ("MatMul", TensorProto.FLOAT16),
        ("Relu", TensorProto.FLOAT16),
        ("MatMul", TensorProto.FLOAT16),
        ("Cast", TensorProto.FLOAT16),
    ]
    assert [tensor.name for tensor in model.graph.initializer] == ["w_fp16"]


def test_a_softmax_between_two_products_stays_fp32() -> None:
    model = make_model(
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
        w=np.eye(2, dtype=np.float32),
    )
    compute_in_half(model, "_fp16")
    assert ("Softmax", TensorProto.FLOAT) in list(list_kinds(model))


def test_a_product_with_a_weight_that_fp16_cannot_hold_stays_fp32() -> None:
    model = make_model(helper.make_node("MatMul", ["x", "w"], ["y"]), w=np.full((2, 2), 70_000.0, np.float32))
    compute_in_half(model, "_fp16")
    assert list(list_kinds(model)) == [("MatMul", TensorProto.FLOAT)]
