"""A network in torch again, from the graph of an artifact."""

import json
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper
from torch import Tensor

from model.checkpoints.state_dicts import StateDict, load_strictly
from model.contract import NETWORK_FILE, Contract
from model.errors import ArtifactError, CheckpointError, ConfigError
from model.networks.architecture import Network, count_flops, list_unexported_weights
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.vit import EncoderConfig, VisionTransformer
from model.validation import parse

FP16_SUFFIX = "_fp16"
INT8_SUFFIX = "_int8"
SCALE_SUFFIX = "_scale"
TRANSPOSED_SUFFIX = ".T"
ALIASES_KEY = "aliases"
"""Of the graph's metadata: weights that are not in it to weights that are equal, as JSON."""
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)


def load_torch_network(contract: Contract, artifact: Path) -> Network:
    """The network of an artifact, its weights from the graph: what is stored there and what its contract chose.

    Weights that no answer depends on are not in a graph and stay as drawn. Raises ArtifactError if any other weight is
    missing, unexpected or misshapen, or if the contract's settings make no network.
    """
    path = artifact / NETWORK_FILE
    try:
        network = _make_network(contract)
        drawn = network.state_dict()
        idle = {name: drawn[name] for name in drawn if name.startswith(list_unexported_weights(network))}
        state = {**idle, **read_graph_weights(path)}
        load_strictly(network, {name: _shape_as(drawn.get(name), state[name]) for name in state})
    except (CheckpointError, ConfigError, TypeError, KeyError, ValueError, DecodeError) as error:
        raise ArtifactError(f"{path} makes no {contract.network} in torch: {error}; export the run again") from error
    return network


def count_artifact_flops(contract: Contract) -> int:
    """Floating-point operations behind one picture's answer on the contract's first canvas; see `count_flops`."""
    canvas = contract.input_sizes[0]
    with torch.device("meta"):
        network = _make_network(contract)
        pixels = torch.zeros(1, 3, canvas.height_px, canvas.width_px, dtype=torch.uint8)
        return count_flops(network, pixels, torch.zeros(1, 2, dtype=torch.int64))


def read_graph_weights(path: Path) -> StateDict:
    """The weights of a graph in fp32, under the names of the state dict that it was written from.

    Names of ours have dots, those of the exporter's constants have none.
    """
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    held: StateDict = {}
    for tensor in stored.values():
        name = tensor.name.removesuffix(FP16_SUFFIX).removesuffix(INT8_SUFFIX)
        if name.endswith(SCALE_SUFFIX):
            continue
        if tensor.data_type in _FLOAT_TYPES or name + SCALE_SUFFIX in stored:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).float()
            if scale := stored.get(name + SCALE_SUFFIX):
                values = (values * torch.from_numpy(numpy_helper.to_array(scale).copy())).flatten(1)
            held[name.removesuffix(TRANSPOSED_SUFFIX)] = values.T if name.endswith(TRANSPOSED_SUFFIX) else values
    told = {entry.key: entry.value for entry in model.metadata_props}
    aliases = json.loads(told.get(ALIASES_KEY, "{}"))
    return {name: held[name] for name in held if "." in name} | {name: held[aliases[name]] for name in aliases}


def _shape_as(drawn: Tensor | None, values: Tensor) -> Tensor:
    """The values with those axes of length 1 that the drawn weight has; an exporter may have folded them."""
    if drawn is None or [length for length in drawn.shape if length > 1] != [
        length for length in values.shape if length > 1
    ]:
        return values
    return values.reshape(drawn.shape)


def _make_network(contract: Contract) -> Network:
    """The untrained network of the contract's settings, for inference."""
    settings = contract.network_config
    match contract.network:
        case "mask_transformer":
            encoder = VisionTransformer(parse(EncoderConfig, settings["encoder"]))
            decoder = MaskDecoder(parse(DecoderConfig, settings["decoder"]), encoder.config)
            return MaskTransformer(encoder, decoder).eval().requires_grad_(False)
        case "panoptic_cascade":
            config = parse(CascadeConfig, settings["cascade"])
            inference = parse(CascadeInferenceConfig, settings["inference"])
            return PanopticCascade(config, inference).eval().requires_grad_(False)
        case other:
            raise ConfigError(f"no network is called {other!r}")
