"""A graph that computes in fp16 where that is safe: convolutions and matrix products, and what lies between them."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

HEAVY = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Computed in fp16 wherever they stand, but for sums of yes and no."""
FOLLOWING = frozenset({
    "Add", "Concat", "Erf", "Expand", "Flatten", "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Computed in fp16 if all that they are given was. Norms, softmax, RoIAlign, top-k and the arithmetic of boxes, which
divides, bounds and exponentiates before it multiplies, are not among them and stay fp32."""
_MOVING = frozenset({"Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SUFFIX = "_half"
_LARGEST = float(np.finfo(np.float16).max)


def compute_in_half(model: onnx.ModelProto, suffix: str) -> None:
    """Rewrite the graph; its inputs and outputs keep their types, its weights their names with `suffix`.

    Where a value is needed in both types, it is cast once.
    """
    graph = _Graph(model)
    chosen = graph.choose()
    produced = {id(node): node for node in chosen}
    halved = {name for node in chosen for name in node.output}
    rewritten: list[NodeProto] = []
    cast: set[str] = set()
    for node in model.graph.node:
        if id(node) not in produced:
            rewritten.append(node)
            continue
        for position, name in graph.list_float_inputs(node):
            if name in graph.constants:
                node.input[position] = graph.halve_constant(name, suffix)
                continue
            node.input[position] = f"{name}{_SUFFIX}"
            if name not in halved | cast:
                rewritten.append(_make_cast(name, f"{name}{_SUFFIX}", TensorProto.FLOAT16))
                cast.add(name)
        outputs = list(node.output)
        node.output[:] = [f"{name}{_SUFFIX}" for name in outputs]
        rewritten.append(node)
        rewritten += [_make_cast(f"{name}{_SUFFIX}", name, TensorProto.FLOAT) for name in outputs]
    graph.replace_nodes(rewritten)


class _Graph:
    """What must be known of a graph to choose."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self._model = model
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._halved_constants: dict[str, str] = {}

    def choose(self) -> list[NodeProto]:
        """The nodes to compute in fp16, in order."""
        chosen: list[NodeProto] = []
        halved: set[str] = set()
        for node in self._model.graph.node:
            given = [name for _, name in self.list_float_inputs(node)]
            varying = [name for name in given if name not in self.constants]
            is_following = bool(varying) and self._is_following(node) and halved.issuperset(varying)
            is_heavy = node.op_type in HEAVY and not any(self._counts(name) for name in varying)
            if (is_following or is_heavy) and all(self._fits(name) for name in given if name in self.constants):
                chosen.append(node)
                halved.update(node.output)
        return chosen

    def list_float_inputs(self, node: NodeProto) -> list[tuple[int, str]]:
        """Position and name of the inputs that are computed with; the scales of Resize are fp32 by its definition."""
        last = 1 if node.op_type == "Resize" else len(node.input)
        named = enumerate(node.input[:last])
        return [(position, name) for position, name in named if self._types.get(name) == TensorProto.FLOAT]

    def halve_constant(self, name: str, suffix: str) -> str:
        """The name of a constant's fp16 copy."""
        if name not in self._halved_constants:
            halved = numpy_helper.to_array(self.constants[name]).astype(np.float16)
            self._halved_constants[name] = f"{name}{suffix}"
            self._model.graph.initializer.append(numpy_helper.from_array(halved, f"{name}{suffix}"))
        return self._halved_constants[name]

    def replace_nodes(self, nodes: list[NodeProto]) -> None:
        """Put these in place of all nodes, without casts and constants that nobody asks for."""
        graph = self._model.graph
        asked = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
        kept = [node for node in nodes if node.op_type != "Cast" or asked.intersection(node.output)]
        asked = {name for node in kept for name in node.input} | {value.name for value in graph.output}
        kept_tensors = [tensor for tensor in graph.initializer if tensor.name in asked]
        for target, remaining in ((graph.node, kept), (graph.initializer, kept_tensors)):
            copies = [type(each).FromString(each.SerializeToString()) for each in remaining]
            del target[:]
            target.extend(copies)
        del graph.value_info[:]

    def _is_following(self, node: NodeProto) -> bool:
        if node.op_type == "Div":  # of GELU alone; boxes divide too
            return [each.op_type for each in self._consumers[node.output[0]]] == ["Erf"]
        return node.op_type in FOLLOWING

    def _fits(self, name: str) -> bool:
        """Whether fp16 holds a constant without overflow."""
        return bool(np.abs(numpy_helper.to_array(self.constants[name])).max(initial=0.0) <= _LARGEST)

    def _counts(self, name: str) -> bool:
        """Whether a value is yes and no, as numbers."""
        return any(
            node.op_type == "Cast" and self._types.get(node.input[0]) == TensorProto.BOOL for node in self._trace(name)
        )

    def _trace(self, name: str) -> Iterator[NodeProto]:
        """The node that made a value, seen through those that only move it."""
        node = self._producers.get(name)
        while node is not None:
            yield node
            node = self._producers.get(node.input[0]) if node.op_type in _MOVING else None


def _make_cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=kind)
