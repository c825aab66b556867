"""Lower precisions of ONNX graphs: fp16 arithmetic where it is safe, and encoder weights stored as int8."""

from collections import defaultdict

import numpy as np
import onnx
import torch
from jaxtyping import Float32, Int8
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from model.backends.torch_session import INT8_SUFFIX, SCALE_SUFFIX, TRANSPOSED_SUFFIX
from model.errors import ConfigError
from model.networks.interface import Network
from model.networks.mask_transformer import MaskTransformer

FP16_OPERATORS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Always computed in fp16, except for sums of booleans."""
FP16_FOLLOWING_OPERATORS = frozenset({
    "Add", "Concat", "Erf", "Expand", "Flatten", "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Computed in fp16 if all their inputs are. Norms, softmax, RoIAlign, top-k and box arithmetic (division, clipping,
exponentials) are not among them and stay fp32."""
_LAYOUT_OPERATORS = frozenset({"Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SUFFIX = "_half"
_FP16_MAX = float(np.finfo(np.float16).max)


def compute_in_fp16(model: onnx.ModelProto, suffix: str) -> None:
    """Rewrite the graph to compute in fp16; inputs and outputs keep their types, fp16 weights get `suffix`.

    A value that is needed in both types is cast once.
    """
    graph = _Graph(model)
    chosen = {id(node) for node in graph.choose()}
    exact = {name for node in graph.nodes if id(node) not in chosen for name in node.input}
    exact.update(value.name for value in model.graph.output)
    halved: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in graph.nodes:
        if id(node) not in chosen:
            rewritten.append(node)
            continue
        for position, name in graph.list_float_inputs(node):
            constant = graph.constants.get(name)
            node.input[position] = half = f"{name}{_SUFFIX if constant is None else suffix}"
            if half not in halved:
                halved.add(half)
                if constant is None:
                    rewritten.append(make_cast(name, half, TensorProto.FLOAT16))
                else:
                    values = numpy_helper.to_array(constant).astype(np.float16)
                    model.graph.initializer.append(numpy_helper.from_array(values, half))
        outputs = list(node.output)
        node.output[:] = [f"{name}{_SUFFIX}" for name in outputs]
        halved.update(node.output)
        rewritten.append(node)
        rewritten += [make_cast(f"{name}{_SUFFIX}", name, TensorProto.FLOAT) for name in outputs if name in exact]
    used = {name for node in rewritten for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, kept in (("node", rewritten), ("initializer", tensors)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(kept)
    model.graph.ClearField("value_info")


class _Graph:
    """Producers, consumers and types of a graph, to choose the nodes that compute in fp16."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        self._producers = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._consumers[name].append(node)

    def choose(self) -> list[NodeProto]:
        """Choose the nodes to compute in fp16, in order."""
        chosen: list[NodeProto] = []
        halved: set[str] = set()
        for node in self.nodes:
            inputs = [name for _, name in self.list_float_inputs(node)]
            varying = [name for name in inputs if name not in self.constants]
            is_following = bool(varying) and self._is_following(node) and halved.issuperset(varying)
            is_heavy = node.op_type in FP16_OPERATORS and not any(self._is_boolean(name) for name in varying)
            if (is_following or is_heavy) and all(self._fits(name) for name in inputs if name in self.constants):
                chosen.append(node)
                halved.update(node.output)
        return chosen

    def list_float_inputs(self, node: NodeProto) -> list[tuple[int, str]]:
        """Position and name of the float inputs; the scales of Resize are fp32 by definition."""
        last = 1 if node.op_type == "Resize" else len(node.input)
        named = enumerate(node.input[:last])
        return [(position, name) for position, name in named if self._types.get(name) == TensorProto.FLOAT]

    def _is_following(self, node: NodeProto) -> bool:
        if node.op_type == "Div":  # only that of GELU; box arithmetic divides too
            return [each.op_type for each in self._consumers[node.output[0]]] == ["Erf"]
        return node.op_type in FP16_FOLLOWING_OPERATORS

    def _fits(self, name: str) -> bool:
        """Whether a constant fits fp16 without overflow."""
        return bool(np.abs(numpy_helper.to_array(self.constants[name])).max(initial=0.0) <= _FP16_MAX)

    def _is_boolean(self, name: str) -> bool:
        """Whether a value is a boolean cast to a number, perhaps in another layout."""
        node = self._producers.get(name)
        while node is not None and node.op_type in _LAYOUT_OPERATORS:
            node = self._producers.get(node.input[0])
        return node is not None and node.op_type == "Cast" and self._types.get(node.input[0]) == TensorProto.BOOL


def make_cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=kind)


_ENCODER_PREFIX = "encoder."
_GROUP_SIZE = 32
"""Neighboring inputs of one output that share a scale. One scale per output changed predictions twice as much."""
_INT8_MAX = 127
_SCALE_MANTISSA_BITS = 12
"""Mantissa bits of a scale, so few that its product with an integer up to 127 is exact in fp32."""


def round_to_int8(network: Network) -> None:
    """Round the matrices of the frozen encoder to 255 levels per group.

    Raises ConfigError for a network without a frozen encoder.
    """
    if not isinstance(network, MaskTransformer):
        raise ConfigError("precision int8-stored needs a frozen encoder: export a mask_transformer")
    for module in network.encoder.modules():
        if isinstance(module, nn.Linear) and module.in_features % _GROUP_SIZE == 0:
            values, scales = _round_groups(module.weight.detach().numpy())
            module.weight.data = torch.from_numpy((values * scales).reshape(module.weight.shape))


def store_as_int8(model: onnx.ModelProto) -> None:
    """Store the encoder matrices that `round_to_int8` rounded as int8, followed by a cast and a multiplication.

    ONNX Runtime folds both when it loads the graph, which then computes with exactly the same values.
    """
    nodes: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        name = tensor.name.removesuffix(TRANSPOSED_SUFFIX)
        is_transposed = name != tensor.name
        if tensor.data_type != TensorProto.FLOAT or not name.startswith(_ENCODER_PREFIX) or len(tensor.dims) != 2:
            continue
        weights = numpy_helper.to_array(tensor)
        weights = weights.T if is_transposed else weights
        if weights.shape[1] % _GROUP_SIZE:
            continue
        values, scales = _round_groups(weights)
        if np.array_equal((values * scales).reshape(weights.shape), weights):
            target = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values, name + INT8_SUFFIX))
            shape = np.array(weights.shape, np.int64)
            model.graph.initializer.append(numpy_helper.from_array(scales, name + SCALE_SUFFIX))
            model.graph.initializer.append(numpy_helper.from_array(shape, f"{name}_shape"))
            nodes += _dequantize_nodes(name, target, is_transposed=is_transposed)
    for position, node in enumerate(nodes):
        model.graph.node.insert(position, node)


def _dequantize_nodes(name: str, target: str, *, is_transposed: bool) -> list[onnx.NodeProto]:
    """Nodes that compute the matrix `target` from integers and scales."""
    matrix = f"{name}_matrix" if is_transposed else target
    nodes = [
        helper.make_node("Cast", [name + INT8_SUFFIX], [f"{name}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_cast", name + SCALE_SUFFIX], [f"{name}_groups"]),
        helper.make_node("Reshape", [f"{name}_groups", f"{name}_shape"], [matrix]),
    ]
    return [*nodes, helper.make_node("Transpose", [matrix], [target], perm=[1, 0])] if is_transposed else nodes


def _round_groups(
    weights: Float32[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O g 32"], Float32[np.ndarray, "O g 1"]]:
    """Return integers and scales of each group; rounding rounded weights returns the same."""
    groups = weights.reshape(len(weights), -1, _GROUP_SIZE)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    mantissas, exponents = np.frexp(largest / np.float32(_INT8_MAX))
    steps = np.float32(2**_SCALE_MANTISSA_BITS)
    scales = np.ldexp(np.ceil(mantissas * steps) / steps, exponents).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1.0))
    return np.round(groups / scales).astype(np.int8), scales
