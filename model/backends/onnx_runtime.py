"""ONNX Runtime sessions, the execution providers they run on, and TensorRT engines on disk.

An engine is for one network, GPU and set of library versions.
"""

import ctypes
import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.contract import NETWORK_FILE, Contract, RawOutputs, check_shapes
from model.errors import ArtifactError, BackendUnavailable

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
CPU_PROVIDERS: list[Provider] = [(PROVIDER_NAMES["cpu"], {})]
PROFILE_BATCH_SIZES = (1, 8, 32)
"""Minimum, typical and maximum batch size that a TensorRT engine is built for."""
_INFER_LIBRARY = "libnvinfer.so.10"
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0")
CACHE_KEY_LENGTH = 32
_TIMEOUT_S = 30.0


def list_cuda_providers() -> list[Provider]:
    """CUDA, with the CPU for operators that it lacks."""
    options = {
        "device_id": "0",
        "use_tf32": "0",  # fp32 means fp32 on every backend; for speed, export fp16
        "cudnn_conv_algo_search": "HEURISTIC",  # the default searches again for every batch size
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    return [(PROVIDER_NAMES["cuda"], options), *CPU_PROVIDERS]


def list_tensorrt_providers(contract: Contract, folder: Path) -> list[Provider]:
    """TensorRT with its engines in `folder`, with CUDA for operators that it lacks.

    Engines accept `PROFILE_BATCH_SIZES` and sides from the shortest to the longest input size, which also allows sizes
    that are not in the contract, and are optimized for the first one.
    """
    heights = [size.height_px for size in contract.all_input_sizes]
    widths = [size.width_px for size in contract.all_input_sizes]
    sides = ((min(heights), min(widths)), (heights[0], widths[0]), (max(heights), max(widths)))
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if contract.precision == "fp16" else "0",
        "trt_layer_norm_fp32_fallback": "1",
    }
    for name, batch, (height, width) in zip(("min", "opt", "max"), PROFILE_BATCH_SIZES, sides, strict=True):
        options[f"trt_profile_{name}_shapes"] = f"pixels:{batch}x3x{height}x{width},sizes:{batch}x2"
    return [(PROVIDER_NAMES["tensorrt"], options), *list_cuda_providers()]


def require_provider(backend: OnnxBackend, providers: Sequence[str], problem: str) -> None:
    """Raise BackendUnavailable, with the problem and what to install, if the backend's provider is none of these."""
    if PROVIDER_NAMES[backend] not in providers:
        raise BackendUnavailable(f"backend {backend}: {problem} {', '.join(providers)}: {_REQUIREMENTS[backend]}")


class OnnxSession:
    """Runs a network in ONNX Runtime."""

    def __init__(
        self,
        network: Path,
        *,
        threads: int,
        backend: OnnxBackend = "cpu",
        providers: Sequence[Provider] = CPU_PROVIDERS,
    ) -> None:
        """`providers` are those of the backend, and others for operators that it lacks.

        Raises ArtifactError if ONNX Runtime rejects the file, BackendUnavailable if it lacks the backend's provider, or
        if this cannot start.
        """
        self.backend: str = backend
        # Given a missing provider, some versions warn and some raise.
        require_provider(backend, onnxruntime.get_available_providers(), "this ONNX Runtime only has")
        onnxruntime.disable_telemetry_events()  # since 1.32 it would report to Microsoft
        try:
            self._session = onnxruntime.InferenceSession(
                network, _session_options(threads), providers=list(providers), enable_fallback=0
            )
        except (ValueError, RuntimeError) as error:  # raised by providers; errors of graphs have other classes
            raise BackendUnavailable(f"{providers[0][0]} cannot start: {_first_line(error)}") from error
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"{network} was rejected by ONNX Runtime: {_first_line(error)}") from error
        # onnxruntime-gpu falls back to the CPU silently if a CUDA library is missing.
        require_provider(backend, self._session.get_providers()[:1], "ONNX Runtime fell back to")
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
    options.log_severity_level = 3  # errors
    # Spinning threads save 3 % of the time on idle cores and cost 60 % on shared ones (docs/experiments).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def engine_folder(contract: Contract, machine: dict[str, str], cache: Path) -> Path:
    """Folder in `cache` for the engines of one network on one machine; each network, version and GPU has its own."""
    parts = {"network": contract.files[NETWORK_FILE], "precision": contract.precision, **machine}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache / key[:CACHE_KEY_LENGTH]


def describe_machine() -> dict[str, str]:
    """Return the GPU, with its compute capability, and the versions that engines depend on.

    Raises BackendUnavailable if there is no GPU or TensorRT.
    """
    try:
        gpu = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailable(f"TensorRT needs an NVIDIA GPU and its driver: {error}") from error
    try:
        version = ctypes.CDLL(_INFER_LIBRARY).getInferLibVersion()  # such as 101303 for 10.13.3
    except OSError as error:
        raise BackendUnavailable(
            f"{_INFER_LIBRARY} cannot be loaded: install TensorRT 10, or use NVIDIA's image ({error})"
        ) from error
    return {"gpu": gpu, "tensorrt": str(version), "onnxruntime": onnxruntime.__version__}
