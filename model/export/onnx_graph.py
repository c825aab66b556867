"""Exports a network as one static ONNX graph with a dynamic batch axis."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from model.backends.onnx_to_torch import ALIASES_KEY, FP16_SUFFIX, TRANSPOSED_SUFFIX
from model.contract import InputSize, Precision
from model.export.precision import compute_in_fp16, store_as_int8
from model.network_io import output_names
from model.networks.interface import Network

_OPSET = 18
_MAX_BATCH_SIZE = 1024
MIN_DYNAMIC_SIDE_PX = 96
"""Below this, the last FPN level has a single row, which the exporter treats as a constant."""
_MIN_STORED_VALUES = 1024
"""Smaller tensors stay fp32."""


def write_graph(network: Network, input_sizes: Sequence[InputSize], precision: Precision, path: Path) -> None:
    """Write the graph, checked by ONNX. Height and width are dynamic if there are several input sizes.

    Weights keep the names of the state dict, with ".T" if they are transposed. Except for precision fp32, weights that
    fp16 represents exactly (see `round_to_fp16`) are stored as fp16; see `model.export.precision` for the others.
    """
    size = input_sizes[0]
    pixels = torch.zeros(2, 3, size.height_px, size.width_px, dtype=torch.uint8)
    sizes = torch.tensor([[size.height_px, size.width_px]] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter, about its own dependencies
        program = torch.onnx.export(
            network,
            (pixels, sizes),
            dynamo=True,
            verbose=False,
            input_names=["pixels", "sizes"],
            output_names=output_names(network.embedding_dim),
            dynamic_shapes=_dynamic_axes(input_sizes, network.side_multiple_px),
            opset_version=_OPSET,
        )
    assert program is not None, "the exporter returned no program"
    graph = program.model_proto
    _name_weights(graph, network)
    aliases = json.dumps(_find_aliases(graph, network))
    match precision:
        case "fp32":
            pass
        case "fp16-stored":
            _store_as_fp16(graph)
        case "int8-stored":
            store_as_int8(graph)
            _store_as_fp16(graph)
        case "fp16":
            compute_in_fp16(graph, FP16_SUFFIX)
    helper.set_model_props(graph, {ALIASES_KEY: aliases})
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def round_to_fp16(network: nn.Module) -> None:
    """Round all large weights to values that fp16 represents."""
    for parameter in network.parameters():
        if parameter.numel() >= _MIN_STORED_VALUES:
            parameter.data = parameter.data.half().float()


def _dynamic_axes(input_sizes: Sequence[InputSize], multiple_px: int) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH_SIZE)
    if len(input_sizes) == 1:
        return {"pixels": {0: batch}, "sizes": {0: batch}}
    rows, columns = (
        torch.export.Dim(name, min=min(sides) // multiple_px, max=max(sides) // multiple_px)
        for name, sides in (
            ("rows", [size.height_px for size in input_sizes]),
            ("columns", [size.width_px for size in input_sizes]),
        )
    )
    return {"pixels": {0: batch, 2: multiple_px * rows, 3: multiple_px * columns}, "sizes": {0: batch}}


def _name_weights(model: onnx.ModelProto, network: nn.Module) -> None:
    """Restore the names of weights that the exporter folded."""
    state = network.state_dict()
    kept = {tensor.name for tensor in model.graph.initializer}
    names = {}
    for name, weight in state.items():
        if name not in kept:
            names[_fingerprint(weight.numpy())] = name
            if weight.ndim == 2:
                names[_fingerprint(weight.numpy().T)] = f"{name}{TRANSPOSED_SUFFIX}"
    renamed: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in state:
            original = names.get(_fingerprint(numpy_helper.to_array(tensor)))
            if original and original not in renamed.values():
                renamed[tensor.name] = original
                tensor.name = original
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _find_aliases(model: onnx.ModelProto, network: Network) -> dict[str, str]:
    """Map each weight that the exporter omitted as a duplicate to the name of the equal one."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    stored = {_fingerprint(numpy_helper.to_array(tensor)): tensor.name for tensor in tensors}
    aliases = {}
    for name, weight in network.state_dict().items():
        found = stored.get(_fingerprint(weight.numpy()), "")
        transposed = stored.get(_fingerprint(weight.numpy().T), "")
        if {name, f"{name}{TRANSPOSED_SUFFIX}"} & set(stored.values()) or name.startswith(network.unexported_weights):
            continue
        if found and not found.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = found
        elif transposed.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = transposed.removesuffix(TRANSPOSED_SUFFIX)
    return aliases


def _fingerprint(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _store_as_fp16(model: onnx.ModelProto) -> None:
    """Store large fp32 weights as fp16 followed by a Cast, which ONNX Runtime folds when it loads the graph."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        halved = values.astype(np.float16)
        if values.size < _MIN_STORED_VALUES or not np.array_equal(halved.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halved, f"{name}{FP16_SUFFIX}"))
        casts.append(
            helper.make_node("Cast", [f"{name}{FP16_SUFFIX}"], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
        )
    for position, cast in enumerate(casts):
        model.graph.node.insert(position, cast)
