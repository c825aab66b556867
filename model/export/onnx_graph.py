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

from model.backends.torch_session import ALIASES_KEY, FP16_SUFFIX, TRANSPOSED_SUFFIX
from model.contract import InputSize, Precision, output_names
from model.export.precision import compute_in_fp16, make_cast, store_as_int8
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
    aliases = _name_weights(graph, network)
    if precision == "fp16":
        compute_in_fp16(graph, FP16_SUFFIX)
    if precision == "int8-stored":
        store_as_int8(graph)
    if precision in ("fp16-stored", "int8-stored"):
        _store_as_fp16(graph)
    helper.set_model_props(graph, {ALIASES_KEY: json.dumps(aliases)})
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


def _name_weights(model: onnx.ModelProto, network: Network) -> dict[str, str]:
    """Restore the names of weights that the exporter folded; return, by its name, the equal of each that it omitted."""
    values: dict[str, str] = {}
    for name, weight in network.state_dict().items():
        values[name] = _fingerprint(weight.numpy())
        if weight.ndim == 2:
            values[f"{name}{TRANSPOSED_SUFFIX}"] = _fingerprint(weight.numpy().T)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    stored = {name: _fingerprint(numpy_helper.to_array(tensor)) for name, tensor in tensors.items()}
    folded = {value: name for name, value in values.items() if name.removesuffix(TRANSPOSED_SUFFIX) not in stored}
    renamed: dict[str, str] = {}
    for name, value in stored.items():
        if name not in values and value in folded:
            renamed[name] = tensors[name].name = folded.pop(value)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    equals = {value: renamed.get(name, name) for name, value in stored.items()}
    kept = {name.removesuffix(TRANSPOSED_SUFFIX) for name in equals.values()}
    aliases: dict[str, str] = {}
    for transposed_name, value in values.items():
        name, equal = transposed_name.removesuffix(TRANSPOSED_SUFFIX), equals.get(value)
        is_omitted = name not in kept and not name.startswith(network.unexported_weights)
        if is_omitted and equal and equal.endswith(TRANSPOSED_SUFFIX) == (name != transposed_name):
            aliases.setdefault(name, equal.removesuffix(TRANSPOSED_SUFFIX))
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
        casts.append(make_cast(f"{name}{FP16_SUFFIX}", name, TensorProto.FLOAT))
    for position, cast in enumerate(casts):
        model.graph.node.insert(position, cast)
