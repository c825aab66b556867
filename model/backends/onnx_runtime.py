"""ONNX Runtime's execution providers: what to ask for, and whether it was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.contract import Contract, Precision
from model.errors import ArtifactError, BackendUnavailable
from model.network_io import OUTPUT_NAMES, RawOutputs, check_shapes

OnnxBackend = Literal["cpu", "cuda", "tensorrt"]
Provider = tuple[str, dict[str, str]]
"""A provider's name and its options."""
InputShapes = dict[str, tuple[int, ...]]
"""By input."""

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
"""Least, likeliest and largest batch that a TensorRT engine is built for."""


@dataclass(frozen=True, kw_only=True)
class OptimizationProfile:
    """The shapes of inputs that a TensorRT engine takes, and those that it is best at."""

    min: InputShapes
    opt: InputShapes
    max: InputShapes


def make_optimization_profile(contract: Contract) -> OptimizationProfile:
    """Batches of `PROFILE_BATCH_SIZES`; where there are several canvases, sides from the shortest to the longest,
    best the first's.

    That allows more than the canvases, such as one of both longest sides: an engine knows no lists.
    """
    heights = [canvas.height_px for canvas in contract.input_sizes]
    widths = [canvas.width_px for canvas in contract.input_sizes]
    sides = ((min(heights), min(widths)), (heights[0], widths[0]), (max(heights), max(widths)))
    least, best, most = (
        {"pixels": (batch, 3, *each), "sizes": (batch, 2)}
        for batch, each in zip(PROFILE_BATCH_SIZES, sides, strict=True)
    )
    return OptimizationProfile(min=least, opt=best, max=most)


def format_shapes(shapes: InputShapes) -> str:
    """As ONNX Runtime's TensorRT options and trtexec spell them: "pixels:1x3x448x448,sizes:1x2"."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def list_cuda_providers() -> list[Provider]:
    """CUDA, and the CPU for what it lacks."""
    options = {
        "device_id": "0",
        "use_tf32": "0",  # fp32 means fp32 on every backend: who wants speed exports fp16
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all of them again for every size of a batch
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    return [(PROVIDER_NAMES["cuda"], options), _CPU]


def list_tensorrt_providers(profile: OptimizationProfile, precision: Precision, folder: Path) -> list[Provider]:
    """TensorRT with its engines kept in `folder`, and CUDA for what it lacks."""
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": format_shapes(profile.min),
        "trt_profile_opt_shapes": format_shapes(profile.opt),
        "trt_profile_max_shapes": format_shapes(profile.max),
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_layer_norm_fp32_fallback": "1",
    }
    return [(PROVIDER_NAMES["tensorrt"], options), *list_cuda_providers()]


def require_provider_available(backend: OnnxBackend, available: Sequence[str]) -> None:
    """Raise BackendUnavailable if this ONNX Runtime lacks the backend.

    Asked for it all the same, some versions would warn, some raise.
    """
    if PROVIDER_NAMES[backend] not in available:
        raise BackendUnavailable(
            f"backend {backend}: this ONNX Runtime has {', '.join(available)} alone: {_REQUIREMENTS[backend]}"
        )


def require_provider_active(backend: OnnxBackend, obtained: str) -> None:
    """Raise BackendUnavailable if another backend than the one asked for was obtained.

    onnxruntime-gpu takes the CPU without a word where a library of CUDA's is missing.
    """
    if obtained != backend:
        raise BackendUnavailable(f"backend {backend}: ONNX Runtime fell back to {obtained}: {_REQUIREMENTS[backend]}")


def backend_of(providers: Sequence[str]) -> OnnxBackend:
    """The backend of a session's first provider, which takes all it can."""
    return next(backend for backend in get_args(OnnxBackend) if PROVIDER_NAMES[backend] == providers[0])


_ORT_ERROR = 3


class OnnxSession:
    """A network on the first of the providers that ONNX Runtime could get; `backend` says which that is."""

    def __init__(
        self, network: Path, *, threads: int, providers: Sequence[Provider] = ((PROVIDER_NAMES["cpu"], {}),)
    ) -> None:
        """Raises ArtifactError if ONNX Runtime refuses the file, BackendUnavailable if a provider cannot start."""
        onnxruntime.disable_telemetry_events()  # since 1.32 it would tell Microsoft
        try:
            self._session = onnxruntime.InferenceSession(
                network, _session_options(threads), providers=list(providers), enable_fallback=0
            )
        except (ValueError, RuntimeError) as error:  # what providers raise; graphs raise classes of their own
            raise BackendUnavailable(f"{providers[0][0]} cannot start: {_first_line(error)}") from error
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"{network} was refused by ONNX Runtime: {_first_line(error)}") from error
        self.backend: str = backend_of(self._session.get_providers())

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixels", np.ascontiguousarray(pixels))
        binding.bind_cpu_input("sizes", np.ascontiguousarray(sizes))
        for part in OUTPUT_NAMES:
            binding.bind_output(part, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = [output.numpy() for output in binding.get_outputs()]
        return [RawOutputs(**dict(zip(OUTPUT_NAMES, row, strict=True))) for row in zip(*outputs, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the graph's inputs and outputs are not what the contract says."""
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        # Axes that have a name take any length.
        actual = {node.name: [each if isinstance(each, int) else None for each in node.shape[1:]] for node in nodes}
        check_shapes(actual, contract)


def materialize_fp32(network: Path, out: Path) -> None:
    """Write the graph with the weights that it computes with, however they are stored."""
    onnxruntime.disable_telemetry_events()
    options = _session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # what is constant is folded
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
