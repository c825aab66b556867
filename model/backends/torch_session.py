"""Runs of a network recorded once for each size of a batch and replayed: CUDA graphs."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from model.backends.onnx_to_torch import load_torch_network
from model.backends.parity import BF16_TOLERANCE, FP16_TOLERANCE, FP32_TOLERANCE, Tolerance
from model.contract import Contract
from model.network_io import RawOutputs
from model.networks.architecture import Network
from model.networks.interface import NetworkOutput
from model.networks.interface import NetworkOutput as RawBatch

logger = logging.getLogger(__name__)

Forward = Callable[[UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], NetworkOutput]
Capture = Callable[[Forward, UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], Forward]
"""Records a run on inputs of those shapes; what it gives takes no others."""

GRAPH_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_WARMUP_RUNS = 3
"""Runs before a recording, so that libraries have chosen their kernels and hold their memory."""


class CudaGraphRunner:
    """Answers batches of any size from recordings of a few, each made when it is first needed.

    A recording is tied to the size of a batch and to the canvas. A batch is filled up to the next size with pictures
    of zeros, and split if it is larger than the largest. After a recording that failed, for whatever reason, all runs
    are eager, and the log says so once.
    """

    def __init__(self, forward: Forward, capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._recordings: dict[tuple[int, ...], Forward] = {}
        self._is_eager = False
        self._lock = threading.Lock()

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """The answers; they belong to the caller."""
        with self._lock:  # a recording has one place for its inputs
            parts = [
                self._run(each, of_each)
                for each, of_each in zip(
                    pixels.split(GRAPH_BATCH_SIZES[-1]), sizes.split(GRAPH_BATCH_SIZES[-1]), strict=True
                )
            ]
        return NetworkOutput(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _run(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        if self._is_eager:
            return self._forward(pixels, sizes)
        count = pixels.shape[0]
        filled, filled_sizes = pad_batch(pixels, sizes)
        key = tuple(filled.shape)
        if key not in self._recordings:
            try:
                self._recordings[key] = self._capture(self._forward, filled, filled_sizes)
            except RuntimeError as error:  # what torch raises for anything that CUDA refuses
                logger.warning("no CUDA graph for %s, running without: %s", key, str(error).splitlines()[0])
                self._is_eager = True
                self._recordings.clear()
                return self._forward(pixels, sizes)
        return NetworkOutput(*(part[:count].clone() for part in self._recordings[key](filled, filled_sizes)))


def choose_graph_batch_size(count: int) -> int:
    """The least of `GRAPH_BATCH_SIZES` that holds as many pictures."""
    return next(batch for batch in GRAPH_BATCH_SIZES if batch >= count)


def pad_batch(
    pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]
) -> tuple[UInt8[Tensor, "N 3 H W"], Int[Tensor, "N 2"]]:
    """The batch with pictures of zeros, as large as the canvas, up to one of `GRAPH_BATCH_SIZES`."""
    count = pixels.shape[0]
    missing = choose_graph_batch_size(count) - count
    empty = pixels.new_zeros((missing, *pixels.shape[1:]))
    whole = sizes.new_tensor([pixels.shape[2:]]).expand(missing, -1)
    return torch.cat([pixels, empty]), torch.cat([sizes, whole])


def capture_cuda_graph(forward: Forward, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Forward:
    """A CUDA graph of one run; its answers are overwritten by the next. Raises RuntimeError if CUDA cannot record it.

    As torch's notes on CUDA graphs ask for: inputs that stay in place, and a warm-up on a side stream.
    """
    kept, kept_sizes = pixels.clone(), sizes.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP_RUNS):
            forward(kept, kept_sizes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = forward(kept, kept_sizes)

    def replay(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        kept.copy_(pixels)
        kept_sizes.copy_(sizes)
        graph.replay()
        return answers

    return replay


TorchPrecision = Literal["fp32", "fp16", "bf16"]

_DTYPES: dict[TorchPrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TOLERANCES: dict[TorchPrecision, Tolerance] = {"fp32": FP32_TOLERANCE, "fp16": FP16_TOLERANCE, "bf16": BF16_TOLERANCE}
_CPU = torch.device("cpu")


class TorchSession:
    """A network on the CPU as it is; on a GPU replayed from CUDA graphs.

    In fp16 or bf16, convolutions and matrix products alone are computed so, by torch's autocast: norms, softmax and the
    arithmetic of boxes stay fp32. (Suppression counts rivals in a matrix product; a sum of zeros and ones is zero in
    any precision or in none.)
    """

    def __init__(self, network: Network, *, device: torch.device = _CPU, precision: TorchPrecision = "fp32") -> None:
        self._network = network.to(device)
        self._device = device
        self._dtype = _DTYPES.get(precision)
        self._forward: Forward = self._run_eager
        if device.type == "cuda":
            self._forward = CudaGraphRunner(self._run_eager, capture_cuda_graph)
        self.backend = "torch" if device.type == "cpu" else f"torch on {device.type}, {precision}"
        self.tolerance = _TOLERANCES[precision]
        """Within which the artifact's golden answers are to be met."""

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        with torch.inference_mode():
            given = (torch.from_numpy(each).to(self._device) for each in (pixels, sizes))
            outputs = self._forward(*given)
            parts = [part.cpu().numpy() for part in outputs]
        return [RawOutputs(**dict(zip(RawBatch._fields, row, strict=True))) for row in zip(*parts, strict=True)]

    def _run_eager(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> RawBatch:
        with self._cast(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs: RawBatch = self._network(pixels, sizes)
        return RawBatch(*(part.float() if part.is_floating_point() else part for part in outputs))

    def _cast(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        # Its cache of cast weights would outlive a CUDA graph's recording.
        return torch.autocast(self._device.type, dtype=self._dtype, cache_enabled=False)


def load_torch_session(
    contract: Contract,
    artifact: Path,
    device: torch.device | None = None,
    precision: TorchPrecision | None = None,
    *,
    threads: int | None = None,
) -> TorchSession:
    """The network of an artifact, not yet checked against its golden answers.

    By default on the first GPU in fp16, or else on the CPU in fp32. `threads` are set for the whole process, as torch
    knows no other way. Raises ArtifactError if the artifact's weights make no network.
    """
    network = load_torch_network(contract, artifact)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    session = TorchSession(network, device=device, precision=precision)
    if precision == "fp32" and contract.precision == "fp16":
        session.tolerance = FP16_TOLERANCE  # the golden answers are rounded, if not these
    return session
