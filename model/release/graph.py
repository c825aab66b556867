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

from model.backends.restoration import ALIASES_KEY, HALF_SUFFIX, TRANSPOSED_SUFFIX
from model.contract import Canvas, FloatPrecision
from model.network.architecture import Network, list_idle
from model.network.panoptic_cascade import PanopticCascade
from model.network.pyramid import SIDE_MULTIPLE_PX
from model.network.roi_onnx import emit_pool
from model.raw import PARTS
from model.release.byte_weights import store_as_bytes
from model.release.half_graph import compute_in_half

_OPSET = 18
_MOST_PICTURES = 1024
LEAST_OPEN_SIDE_PX = 96
"""Below, the pyramid's last level has a single row, which the exporter takes for a constant."""
_LEAST_WEIGHTS = 1024
"""Smaller tensors stay fp32: nothing to gain."""


def write_graph(network: Network, canvases: Sequence[Canvas], precision: FloatPrecision, path: Path) -> None:
    """Write the graph, checked by ONNX. Height and width stay open if there are several canvases.

    Weights keep the names of the state dict, with ".T" where they lie transposed. fp32 weights that fp16 holds exactly
    are stored so unless all is fp32; see `round_to_half`, and `byte_weights` for int8. With fp16, the graph computes so
    too; see `half_graph`.
    """
    canvas = canvases[0]
    pixels = torch.zeros(2, 3, canvas.height_px, canvas.width_px, dtype=torch.uint8)
    sizes = torch.tensor([[canvas.height_px, canvas.width_px]] * 2)
    with _lowered(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own dependencies
        program = torch.onnx.export(
            network,
            (pixels, sizes),
            dynamo=True,
            verbose=False,
            input_names=["pixels", "sizes"],
            output_names=PARTS,
            dynamic_shapes=_open_axes(canvases),
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
            _store_as_half(graph)
        case "int8-stored":
            store_as_bytes(graph)
            _store_as_half(graph)
        case "fp16":
            compute_in_half(graph, HALF_SUFFIX)
    helper.set_model_props(graph, {ALIASES_KEY: aliases})
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def round_to_half(network: nn.Module) -> None:
    """Round all large weights to what fp16 can hold."""
    for parameter in network.parameters():
        if parameter.numel() >= _LEAST_WEIGHTS:
            parameter.data = parameter.data.half().float()


def _open_axes(canvases: Sequence[Canvas]) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=_MOST_PICTURES)
    if len(canvases) == 1:
        return {"pixels": {0: batch}, "sizes": {0: batch}}
    rows, columns = (
        torch.export.Dim(name, min=min(sides) // SIDE_MULTIPLE_PX, max=max(sides) // SIDE_MULTIPLE_PX)
        for name, sides in (
            ("rows", [canvas.height_px for canvas in canvases]),
            ("columns", [canvas.width_px for canvas in canvases]),
        )
    )
    return {"pixels": {0: batch, 2: SIDE_MULTIPLE_PX * rows, 3: SIDE_MULTIPLE_PX * columns}, "sizes": {0: batch}}


@contextmanager
def _lowered(network: nn.Module) -> Iterator[None]:
    """The network with RoIAlign as ONNX's operator."""
    if not isinstance(network, PanopticCascade):
        yield
        return
    heads = network.roi_heads
    pool, heads.pool = heads.pool, emit_pool
    try:
        yield
    finally:
        heads.pool = pool


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
        if {name, f"{name}{TRANSPOSED_SUFFIX}"} & set(held.values()) or name.startswith(list_idle(network)):
            continue
        if found and not found.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = found
        elif turned.endswith(TRANSPOSED_SUFFIX):
            aliases[name] = turned.removesuffix(TRANSPOSED_SUFFIX)
    return aliases


def _fingerprint(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _store_as_half(model: onnx.ModelProto) -> None:
    """Keep large fp32 weights as fp16 behind a Cast, which ONNX Runtime folds once at loading."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        halved = values.astype(np.float16)
        if values.size < _LEAST_WEIGHTS or not np.array_equal(halved.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halved, f"{name}{HALF_SUFFIX}"))
        casts.append(
            helper.make_node("Cast", [f"{name}{HALF_SUFFIX}"], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
        )
    for position, cast in enumerate(casts):
        model.graph.node.insert(position, cast)
