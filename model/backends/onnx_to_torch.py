"""Rebuilds the torch network from the ONNX graph of an artifact."""

import json
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper
from torch import Tensor

from model.checkpoints.state_dicts import StateDict, load_strictly
from model.contract import NETWORK_FILE, Contract
from model.errors import ArtifactError, CheckpointError, ConfigError
from model.networks.interface import Network
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer, PatchEmbedding
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.vit import EncoderConfig, VisionTransformer
from model.validation import parse

FP16_SUFFIX = "_fp16"
INT8_SUFFIX = "_int8"
SCALE_SUFFIX = "_scale"
TRANSPOSED_SUFFIX = ".T"
ALIASES_KEY = "aliases"
"""Metadata key of the graph: omitted weights and the equal weights that are stored, as JSON."""
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)


def load_torch_network(contract: Contract, artifact: Path) -> Network:
    """Build the network from the contract's configuration and the weights of the graph.

    Weights that no output depends on are not in the graph and stay at their initial values. Raises ArtifactError if any
    other weight is missing, unexpected or misshapen, or if the configuration is invalid.
    """
    path = artifact / NETWORK_FILE
    try:
        network = _make_network(contract)
        initial = network.state_dict()
        unexported = {name: initial[name] for name in initial if name.startswith(network.unexported_weights)}
        state = {**unexported, **read_graph_weights(path)}
        load_strictly(network, {name: _restore_shape(state[name], initial.get(name)) for name in state})
    except (CheckpointError, ConfigError, TypeError, KeyError, ValueError, DecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be loaded as a {contract.network} in torch: {error}; export the run again"
        ) from error
    return network


def read_graph_weights(path: Path) -> StateDict:
    """Read the weights of a graph as fp32, with the names of the state dict that was exported.

    Our names contain dots; those of the exporter's constants do not.
    """
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights: StateDict = {}
    for tensor in stored.values():
        name = tensor.name.removesuffix(FP16_SUFFIX).removesuffix(INT8_SUFFIX)
        if name.endswith(SCALE_SUFFIX):
            continue
        if tensor.data_type in _FLOAT_TYPES or name + SCALE_SUFFIX in stored:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).float()
            if scale := stored.get(name + SCALE_SUFFIX):
                values = (values * torch.from_numpy(numpy_helper.to_array(scale).copy())).flatten(1)
            weights[name.removesuffix(TRANSPOSED_SUFFIX)] = values.T if name.endswith(TRANSPOSED_SUFFIX) else values
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    aliases = json.loads(metadata.get(ALIASES_KEY, "{}"))
    return {name: weights[name] for name in weights if "." in name} | {name: weights[aliases[name]] for name in aliases}


def _restore_shape(values: Tensor, initial: Tensor | None) -> Tensor:
    """Restore axes of length 1 that the exporter may have folded."""
    if initial is not None and values.squeeze().shape == initial.squeeze().shape:
        return values.reshape(initial.shape)
    return values


def _make_network(contract: Contract) -> Network:
    """Return an untrained network of the contract's configuration, for inference."""
    settings = contract.network_config
    match contract.network:
        case "mask_transformer":
            encoder = VisionTransformer(parse(EncoderConfig, settings["encoder"]))
            decoder = MaskDecoder(parse(DecoderConfig, settings["decoder"]), encoder.config)
            embedding = PatchEmbedding(encoder.config, contract.embedding_dim) if contract.embedding_dim else None
            return MaskTransformer(encoder, decoder, embedding).eval().requires_grad_(False)
        case "panoptic_cascade":
            config = parse(CascadeConfig, settings["cascade"])
            inference = parse(CascadeInferenceConfig, settings["inference"])
            return PanopticCascade(config, inference).eval().requires_grad_(False)
        case other:
            raise ConfigError(f"unknown network {other!r}")
