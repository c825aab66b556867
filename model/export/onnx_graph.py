"""A network to one static ONNX graph with a dynamic batch axis."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from model.backends.onnx_to_torch import ALIASES_KEY, FP16_SUFFIX, TRANSPOSED_SUFFIX
from model.contract import FloatPrecision, InputSize
from model.export.precision import compute_in_fp16, store_as_int8
from model.network_io import OUTPUT_NAMES
from model.networks.architecture import Network, list_unexported_weights
from model.networks.fpn import SIDE_MULTIPLE_PX
from model.networks.panoptic_cascade import PanopticCascade
from model.networks.roi_align import roi_align_onnx

_OPSET = 18
_MAX_BATCH_SIZE = 1024
MIN_DYNAMIC_SIDE_PX = 96
"""Below, the pyramid's last level has a single row, which the exporter takes for a constant."""
_MIN_STORED_VALUES = 1024
"""Smaller tensors stay fp32: nothing to gain."""


def write_graph(network: Network, input_sizes: Sequence[InputSize], precision: FloatPrecision, path: Path) -> None:
    """Write the graph, checked by ONNX. Height and width stay open if there are several canvases.

    Weights keep the names of the state dict, with ".T" where they lie transposed. fp32 weights that fp16 holds exactly
    are stored so unless all is fp32; see `round_to_fp16`, and `byte_weights` for int8. With fp16, the graph computes so
    too; see `half_graph`.
    """
    canvas = input_sizes[0]
    pixels = torch.zeros(2, 3, canvas.height_px, canvas.width_px, dtype=torch.uint8)
    sizes = torch.tensor([[canvas.height_px, canvas.width_px]] * 2)
    with _onnx_roi_align(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own dependencies
        program = torch.onnx.export(
            network,
            (pixels, sizes),
            dynamo=True,
            verbose=False,
            input_names=["pixels", "sizes"],
            output_names=OUTPUT_NAMES,
            dynamic_shapes=_dynamic_axes(input_sizes),
            opset_version=_OPSET,
        )
    assert program is not None, "the exporter gave no program"
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
    """Round all large weights to what fp16 can hold."""
    for parameter in network.parameters():
        if parameter.numel() >= _MIN_STORED_VALUES:
            parameter.data = parameter.data.half().float()


def _dynamic_axes(input_sizes: Sequence[InputSize]) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH_SIZE)
    if len(input_sizes) == 1:
        return {"pixels": {0: batch}, "sizes": {0: batch}}
    rows, columns = (
        torch.export.Dim(name, min=min(sides) // SIDE_MULTIPLE_PX, max=max(sides) // SIDE_MULTIPLE_PX)
        for name, sides in (
            ("rows", [canvas.height_px for canvas in input_sizes]),
            ("columns", [canvas.width_px for canvas in input_sizes]),
        )
    )
    return {"pixels": {0: batch, 2: SIDE_MULTIPLE_PX * rows, 3: SIDE_MULTIPLE_PX * columns}, "sizes": {0: batch}}


@contextmanager
def _onnx_roi_align(network: nn.Module) -> Iterator[None]:
    """The network with RoIAlign as ONNX's operator."""
    if not isinstance(network, PanopticCascade):
        yield
        return
    heads = network.roi_heads
    original, heads.roi_align = heads.roi_align, roi_align_onnx
    try:
        yield
    finally:
        heads.roi_align = original


def _name_weights(model: onnx.ModelProto, network: nn.Module) -> None:
    """Give weights that the exporter folded their names back."""
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
    """For each weight that the exporter left out since an equal one is there, the name of that one."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    held = {_fingerprint(numpy_helper.to_array(tensor)): tensor.name for tensor in tensors}
    aliases = {}
    for name, weight in network.state_dict().items():
        found = held.get(_fingerprint(weight.numpy()), "")
        turned = held.get(_fingerprint(weight.numpy().T), "")
        if {name, f"{name}{TRANSPOSED_SUFFIX}"} & set(held.values()) or name.startswith(
            list_unexported_weights(network)
        ):
            continue
        if found and not found.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = found
        elif turned.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = turned.removesuffix(TRANSPOSED_SUFFIX)
    return aliases


def _fingerprint(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _store_as_fp16(model: onnx.ModelProto) -> None:
    """Keep large fp32 weights as fp16 behind a Cast, which ONNX Runtime folds once at loading."""
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
