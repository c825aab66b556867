"""Weights of an encoder in eight bits each, computed with as fp32."""

from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float32, Int8
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from model.backends.restoration import BYTE_SUFFIX, SCALE_SUFFIX, TRANSPOSED_SUFFIX
from model.errors import ConfigError
from model.network.architecture import Network
from model.network.mask_transformer import MaskTransformer

_PREFIX = "encoder."
_GROUP = 32
"""Weights that share a scale: one output's, of neighbouring inputs. A whole row's moved answers twice as far."""
_LARGEST = 127
_MANTISSA_BITS = 12
"""Of a scale: few enough for its product with a whole number up to 127 to be exact in fp32."""


def round_to_bytes(network: Network) -> None:
    """Round the encoder's matrices to 255 levels a group.

    Raises ConfigError for a network without a frozen encoder, which would have to learn to live with it.
    """
    if not isinstance(network, MaskTransformer):
        raise ConfigError("int8-stored is for mask transformers: a panoptic cascade has no frozen encoder")
    for module in network.encoder.modules():
        if isinstance(module, nn.Linear) and module.in_features % _GROUP == 0:
            values, scales = _round(module.weight.detach().numpy())
            module.weight.data = torch.from_numpy((values * scales).reshape(module.weight.shape))


def store_as_bytes(model: onnx.ModelProto) -> None:
    """Keep fp32 matrices of the encoder that `round_to_bytes` rounded as int8, behind a cast and a product.

    ONNX Runtime folds both once at loading: the graph computes with the same numbers bit for bit.
    """
    nodes: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        name = tensor.name.removesuffix(TRANSPOSED_SUFFIX)
        is_turned = name != tensor.name
        if tensor.data_type != TensorProto.FLOAT or not name.startswith(_PREFIX) or len(tensor.dims) != 2:
            continue
        weights = numpy_helper.to_array(tensor)
        weights = weights.T if is_turned else weights
        if weights.shape[1] % _GROUP:
            continue
        values, scales = _round(weights)
        if np.array_equal((values * scales).reshape(weights.shape), weights):
            target = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values, name + BYTE_SUFFIX))
            shape = np.array(weights.shape, np.int64)
            model.graph.initializer.append(numpy_helper.from_array(scales, name + SCALE_SUFFIX))
            model.graph.initializer.append(numpy_helper.from_array(shape, f"{name}_shape"))
            nodes += _unfold(name, target, is_turned=is_turned)
    for position, node in enumerate(nodes):
        model.graph.node.insert(position, node)


def _unfold(name: str, target: str, *, is_turned: bool) -> list[onnx.NodeProto]:
    """Bytes and scales to the matrix `target`."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Cast", [name + BYTE_SUFFIX], {"to": TensorProto.FLOAT}),
        ("Mul", [f"{name}_cast", name + SCALE_SUFFIX], {}),
        ("Reshape", [f"{name}_mul", f"{name}_shape"], {}),
        *([("Transpose", [f"{name}_reshape"], {"perm": [1, 0]})] if is_turned else []),
    ]
    nodes = [
        helper.make_node(kind, inputs, [f"{name}_{kind.lower()}"], name=f"{name}_{kind.lower()}", **settings)
        for kind, inputs, settings in steps
    ]
    nodes[-1].output[0] = target
    return nodes


def _round(weights: Float32[np.ndarray, "O I"]) -> tuple[Int8[np.ndarray, "O g 32"], Float32[np.ndarray, "O g 1"]]:
    """Whole numbers and scales, group by group; rounding what was rounded before gives the same."""
    groups = weights.reshape(len(weights), -1, _GROUP)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    mantissas, exponents = np.frexp(largest / np.float32(_LARGEST))
    steps = np.float32(2**_MANTISSA_BITS)
    scales = np.ldexp(np.ceil(mantissas * steps) / steps, exponents).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1.0))
    return np.round(groups / scales).astype(np.int8), scales
