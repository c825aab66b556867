"""ONNX Runtime sessions, and the execution providers they run on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.contract import Contract, Precision
from model.errors import ArtifactError, BackendUnavailable
from model.network_io import RawOutputs, check_shapes

OnnxBackend = Literal["cpu", "cuda", "tensorrt"]
Provider = tuple[str, dict[str, str]]
"""Name and options of a provider."""

PROVIDER_NAMES: dict[OnnxBackend, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_REQUIREMENTS: dict[OnnxBackend, str] = {
    "cpu": "install useg[service]",
    "cuda": "install useg[service-gpu] in an environment without onnxruntime, CUDA 13 and cuDNN 9",
    "tensorrt": "install useg[service-gpu] in an environment without onnxruntime, CUDA 13, cuDNN 9 and TensorRT 10",
}
_CPU: Provider = (PROVIDER_NAMES["cpu"], {})
PROFILE_BATCH_SIZES = (1, 8, 32)
"""Minimum, typical and maximum batch size that a TensorRT engine is built for."""


def make_optimization_profile(contract: Contract) -> dict[str, str]:
    """Return the input shapes that a TensorRT engine accepts ("min", "max") and is optimized for ("opt").

    They are written as ONNX Runtime's options: "pixels:1x3x448x448,sizes:1x2". Batches are `PROFILE_BATCH_SIZES`, sides
    from the shortest to the longest input size, optimized for the first one. A range also allows sizes that are not in
    the contract.
    """
    heights = [size.height_px for size in contract.all_input_sizes]
    widths = [size.width_px for size in contract.all_input_sizes]
    sides = ((min(heights), min(widths)), (heights[0], widths[0]), (max(heights), max(widths)))
    return {
        name: f"pixels:{batch}x3x{height}x{width},sizes:{batch}x2"
        for name, batch, (height, width) in zip(("min", "opt", "max"), PROFILE_BATCH_SIZES, sides, strict=True)
    }


def list_cuda_providers() -> list[Provider]:
    """CUDA, with the CPU for operators that it lacks."""
    options = {
        "device_id": "0",
        "use_tf32": "0",  # fp32 means fp32 on every backend; for speed, export fp16
        "cudnn_conv_algo_search": "HEURISTIC",  # the default searches again for every batch size
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    return [(PROVIDER_NAMES["cuda"], options), _CPU]


def list_tensorrt_providers(profile: dict[str, str], precision: Precision, folder: Path) -> list[Provider]:
    """TensorRT with its engines in `folder`, with CUDA for operators that it lacks."""
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        **{f"trt_profile_{name}_shapes": shapes for name, shapes in profile.items()},
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_layer_norm_fp32_fallback": "1",
    }
    return [(PROVIDER_NAMES["tensorrt"], options), *list_cuda_providers()]


def require_provider_available(backend: OnnxBackend, available: Sequence[str]) -> None:
    """Raise BackendUnavailable if this build of ONNX Runtime lacks the backend's provider.

    Given a missing provider, some versions of ONNX Runtime warn and some raise.
    """
    if PROVIDER_NAMES[backend] not in available:
        raise BackendUnavailable(
            f"backend {backend}: this ONNX Runtime only has {', '.join(available)}: {_REQUIREMENTS[backend]}"
        )


def require_provider_active(backend: OnnxBackend, actual: str) -> None:
    """Raise BackendUnavailable if a session runs on another backend than the requested one.

    onnxruntime-gpu falls back to the CPU silently if a CUDA library is missing.
    """
    if actual != backend:
        raise BackendUnavailable(f"backend {backend}: ONNX Runtime fell back to {actual}: {_REQUIREMENTS[backend]}")


def backend_of(providers: Sequence[str]) -> OnnxBackend:
    """The backend of a session's first provider, which runs all operators that it supports."""
    return next(backend for backend in get_args(OnnxBackend) if PROVIDER_NAMES[backend] == providers[0])


_ORT_ERROR = 3


class OnnxSession:
    """Runs a network in ONNX Runtime; `backend` is the first provider that it could load."""

    def __init__(
        self, network: Path, *, threads: int, providers: Sequence[Provider] = ((PROVIDER_NAMES["cpu"], {}),)
    ) -> None:
        """Raises ArtifactError if ONNX Runtime rejects the file, BackendUnavailable if a provider cannot start."""
        onnxruntime.disable_telemetry_events()  # since 1.32 it would report to Microsoft
        try:
            self._session = onnxruntime.InferenceSession(
                network, _session_options(threads), providers=list(providers), enable_fallback=0
            )
        except (ValueError, RuntimeError) as error:  # raised by providers; errors of graphs have other classes
            raise BackendUnavailable(f"{providers[0][0]} cannot start: {_first_line(error)}") from error
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"{network} was rejected by ONNX Runtime: {_first_line(error)}") from error
        self.backend: str = backend_of(self._session.get_providers())
        self._output_names = [node.name for node in self._session.get_outputs()]

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixels", np.ascontiguousarray(pixels))
        binding.bind_cpu_input("sizes", np.ascontiguousarray(sizes))
        for part in self._output_names:
            binding.bind_output(part, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = [output.numpy() for output in binding.get_outputs()]
        return [RawOutputs(**dict(zip(self._output_names, row, strict=True))) for row in zip(*outputs, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the inputs and outputs of the graph differ from the contract."""
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        # Named axes have any length.
        actual = {node.name: [each if isinstance(each, int) else None for each in node.shape[1:]] for node in nodes}
        check_shapes(actual, contract)


def materialize_fp32(network: Path, out: Path) -> None:
    """Write the graph with fp32 weights instead of compressed ones."""
    onnxruntime.disable_telemetry_events()
    options = _session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # folds constants
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(network, options, providers=[PROVIDER_NAMES["cpu"]])


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ORT_ERROR
    # Spinning threads save 3 % of the time on idle cores and cost 60 % on shared ones (docs/experiments).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
