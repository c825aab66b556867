"""A network in ONNX Runtime, behind the protocol of every session."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.backends.providers import NAMES, Provider, name_backend
from model.contract import Contract
from model.errors import ArtifactError, BackendUnavailable
from model.raw import PARTS, Raw
from model.shapes import require_shapes

_ORT_ERROR = 3


class OnnxSession:
    """A network on the first of the providers that ONNX Runtime could get; `backend` says which that is."""

    def __init__(self, network: Path, *, threads: int, providers: Sequence[Provider] = ((NAMES["cpu"], {}),)) -> None:
        """Raises ArtifactError if ONNX Runtime refuses the file, BackendUnavailable if a provider cannot start."""
        onnxruntime.disable_telemetry_events()  # since 1.32 it would tell Microsoft
        try:
            self._session = onnxruntime.InferenceSession(
                network, _make_options(threads), providers=list(providers), enable_fallback=0
            )
        except (ValueError, RuntimeError) as error:  # what providers raise; graphs raise classes of their own
            raise BackendUnavailable(f"{providers[0][0]} cannot start: {_take_line(error)}") from error
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"{network} was refused by ONNX Runtime: {_take_line(error)}") from error
        self.backend: str = name_backend(self._session.get_providers())

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[Raw]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixels", np.ascontiguousarray(pixels))
        binding.bind_cpu_input("sizes", np.ascontiguousarray(sizes))
        for part in PARTS:
            binding.bind_output(part, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = [output.numpy() for output in binding.get_outputs()]
        return [Raw(**dict(zip(PARTS, row, strict=True))) for row in zip(*outputs, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the graph's inputs and outputs are not what the contract says."""
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        # Axes that have a name take any length.
        actual = {node.name: [each if isinstance(each, int) else None for each in node.shape[1:]] for node in nodes}
        require_shapes(actual, contract)


def widen(network: Path, out: Path) -> None:
    """Write the graph with the weights that it computes with, however they are stored."""
    onnxruntime.disable_telemetry_events()
    options = _make_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # what is constant is folded
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(network, options, providers=[NAMES["cpu"]])


def _make_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ORT_ERROR
    # Threads that spin between operators save 3 % of the time on idle cores, and cost 60 % on shared ones (LOG.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _take_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
