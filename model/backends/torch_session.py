"""A network in torch, behind the protocol of every session."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from model.backends.captures import CapturedForward, Forward, capture_cuda_graph
from model.backends.parity import BF16, FP16, FP32, Tolerance
from model.backends.restoration import restore_network
from model.contract import Contract
from model.network.architecture import Network
from model.network.raw import Raw as RawBatch
from model.raw import Raw

logger = logging.getLogger(__name__)

TorchPrecision = Literal["fp32", "fp16", "bf16"]

_DTYPES: dict[TorchPrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TOLERANCES: dict[TorchPrecision, Tolerance] = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
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
            self._forward = CapturedForward(self._run_eager, capture_cuda_graph)
        self.backend = "torch" if device.type == "cpu" else f"torch on {device.type}, {precision}"
        self.tolerance = _TOLERANCES[precision]
        """Within which the artifact's golden answers are to be met."""

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[Raw]:
        with torch.inference_mode():
            given = (torch.from_numpy(each).to(self._device) for each in (pixels, sizes))
            outputs = self._forward(*given)
            parts = [part.cpu().numpy() for part in outputs]
        return [Raw(**dict(zip(RawBatch._fields, row, strict=True))) for row in zip(*parts, strict=True)]

    def _run_eager(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> RawBatch:
        with self._cast(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs: RawBatch = self._network(pixels, sizes)
        return RawBatch(*(part.float() if part.is_floating_point() else part for part in outputs))

    def _cast(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        # Its cache of cast weights would outlive a CUDA graph's recording.
        return torch.autocast(self._device.type, dtype=self._dtype, cache_enabled=False)


def open_torch_session(
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
    network = restore_network(contract, artifact)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    session = TorchSession(network, device=device, precision=precision)
    if precision == "fp32" and contract.precision == "fp16":
        session.tolerance = FP16  # the golden answers are rounded, if not these
    return session
