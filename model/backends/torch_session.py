"""torch sessions (eager on the CPU, CUDA graphs on a GPU) of networks that are rebuilt from their ONNX graphs."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from jaxtyping import Int, Int64, UInt8
from onnx import TensorProto, numpy_helper
from torch import Tensor
from torch.nn import functional

from model.backends.parity import FP16_TOLERANCE, FP32_TOLERANCE
from model.checkpoints.state_dicts import StateDict, load_strictly
from model.contract import NETWORK_FILE, Contract, RawOutputs
from model.errors import ArtifactError, CheckpointError, ConfigError
from model.networks.interface import Network, NetworkOutput
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer, PatchEmbedding
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.vit import EncoderConfig, VisionTransformer
from model.validation import parse

logger = logging.getLogger(__name__)

Forward = Callable[[UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], NetworkOutput]
Capture = Callable[[Forward, UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], Forward]
"""Captures a run on inputs; the result takes only inputs of the same shapes."""

FP16_SUFFIX = "_fp16"
INT8_SUFFIX = "_int8"
SCALE_SUFFIX = "_scale"
TRANSPOSED_SUFFIX = ".T"
ALIASES_KEY = "aliases"
"""Metadata key of the graph: omitted weights and the equal weights that are stored, as JSON."""
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)

GRAPH_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_WARMUP_RUNS = 3
"""Runs before a capture, so that libraries have chosen kernels and allocated memory."""


class CudaGraphRunner:
    """Runs batches of any size by CUDA graphs of a few batch sizes, each captured on first use.

    A graph has a fixed batch size and input size. A batch is padded with zeros to the next batch size, and split if it
    exceeds the largest. After a capture has failed, all runs are eager; this is logged once.
    """

    def __init__(self, forward: Forward, capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._graphs: dict[tuple[int, ...], Forward] = {}
        self._is_eager = False
        self._lock = threading.Lock()

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """Run the network; the caller owns the returned tensors."""
        largest = GRAPH_BATCH_SIZES[-1]
        with self._lock:  # a graph has one input buffer
            parts = list(map(self._run, pixels.split(largest), sizes.split(largest)))
        return NetworkOutput(**{name: torch.cat([each.parts[name] for each in parts]) for name in parts[0].parts})

    def _run(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        if self._is_eager:
            return self._forward(pixels, sizes)
        count = pixels.shape[0]
        missing = next(batch for batch in GRAPH_BATCH_SIZES if batch >= count) - count
        padded = functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
        padded_sizes = torch.cat([sizes, sizes[-1:].expand(missing, -1)])
        key = tuple(padded.shape)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(self._forward, padded, padded_sizes)
            except RuntimeError as error:  # raised by torch for any CUDA error
                logger.warning(
                    "cannot capture a CUDA graph for %s, running eagerly: %s", key, str(error).splitlines()[0]
                )
                self._is_eager = True
                self._graphs.clear()
                return self._forward(pixels, sizes)
        return self._graphs[key](padded, padded_sizes).map(lambda part: part[:count].clone())


def capture_cuda_graph(forward: Forward, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Forward:
    """Capture a CUDA graph of one run; each replay overwrites its outputs.

    Raises RuntimeError if CUDA cannot capture it. As torch's notes on CUDA graphs require:
    static input buffers, and warm-up runs on a side stream.
    """
    static_pixels, static_sizes = pixels.clone(), sizes.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP_RUNS):
            forward(static_pixels, static_sizes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward(static_pixels, static_sizes)

    def replay(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        static_pixels.copy_(pixels)
        static_sizes.copy_(sizes)
        graph.replay()
        return outputs

    return replay


TorchPrecision = Literal["fp32", "fp16"]
_CPU = torch.device("cpu")


class TorchSession:
    """Runs a network in torch: eagerly on the CPU, by CUDA graphs on a GPU.

    In fp16, only convolutions and matrix products have that precision, by autocast: norms, softmax and box
    arithmetic stay fp32. (NMS counts boxes in a matrix product; whether that sum is zero is exact in any precision.)
    """

    def __init__(self, network: Network, *, device: torch.device = _CPU, precision: TorchPrecision = "fp32") -> None:
        self._network = network.to(device)
        self._device = device
        self._is_half = precision == "fp16"
        self._forward: Forward = self._run_eager
        if device.type == "cuda":
            self._forward = CudaGraphRunner(self._run_eager, capture_cuda_graph)
        self.backend = "torch" if device.type == "cpu" else f"torch on {device.type}, {precision}"
        self.tolerance = FP16_TOLERANCE if self._is_half else FP32_TOLERANCE
        """Tolerance for comparing with the artifact's golden outputs."""

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        with torch.inference_mode():
            outputs = self._forward(*(torch.from_numpy(each).to(self._device) for each in (pixels, sizes)))
            parts = {name: part.cpu().numpy() for name, part in outputs.parts.items()}
        return [RawOutputs(**dict(zip(parts, row, strict=True))) for row in zip(*parts.values(), strict=True)]

    def _run_eager(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        # Autocast's cache of cast weights would outlive the capture of a CUDA graph.
        half = torch.autocast(self._device.type, torch.float16, enabled=self._is_half, cache_enabled=False)
        with half, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs: NetworkOutput = self._network(pixels, sizes)
        return outputs.map(lambda part: part.float() if part.is_floating_point() else part)


def load_torch_session(contract: Contract, artifact: Path, *, threads: int | None = None) -> TorchSession:
    """Load the network of an artifact, in fp16 on the first GPU or in fp32 on the CPU; golden outputs are not compared.

    `threads` applies to the whole process, as torch has no other setting. Raises ArtifactError if the artifact's
    weights do not make a network.
    """
    network = load_torch_network(contract, artifact)
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        return TorchSession(network, device=torch.device("cuda"), precision="fp16")
    session = TorchSession(network)
    if contract.precision == "fp16":
        session.tolerance = FP16_TOLERANCE  # the golden outputs were computed in fp16
    return session


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
