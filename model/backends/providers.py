"""ONNX Runtime's execution providers: what to ask for, and whether it was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from model.contract import Contract, Precision
from model.errors import BackendUnavailable

OnnxBackend = Literal["cpu", "cuda", "tensorrt"]
Provider = tuple[str, dict[str, str]]
"""A provider's name and its options."""
Shapes = dict[str, tuple[int, ...]]
"""By input."""

NAMES: dict[OnnxBackend, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_NEEDS: dict[OnnxBackend, str] = {
    "cpu": "install useg[service]",
    "cuda": "install useg[service-gpu] in an environment without onnxruntime, CUDA 13 and cuDNN 9",
    "tensorrt": "install useg[service-gpu] in an environment without onnxruntime, CUDA 13, cuDNN 9 and TensorRT 10",
}
_CPU: Provider = (NAMES["cpu"], {})
BATCHES = (1, 8, 32)
"""Least, likeliest and largest batch that a TensorRT engine is built for."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes of inputs that a TensorRT engine takes, and those that it is best at."""

    least: Shapes
    best: Shapes
    most: Shapes


def make_profile(contract: Contract) -> Profile:
    """Batches of `BATCHES`; where there are several canvases, sides from the shortest to the longest, best the first's.

    That allows more than the canvases, such as one of both longest sides: an engine knows no lists.
    """
    heights = [canvas.height_px for canvas in contract.canvases]
    widths = [canvas.width_px for canvas in contract.canvases]
    sides = ((min(heights), min(widths)), (heights[0], widths[0]), (max(heights), max(widths)))
    least, best, most = (
        {"pixels": (batch, 3, *each), "sizes": (batch, 2)} for batch, each in zip(BATCHES, sides, strict=True)
    )
    return Profile(least=least, best=best, most=most)


def render_shapes(shapes: Shapes) -> str:
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
    return [(NAMES["cuda"], options), _CPU]


def list_tensorrt_providers(profile: Profile, precision: Precision, folder: Path) -> list[Provider]:
    """TensorRT with its engines kept in `folder`, and CUDA for what it lacks."""
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": render_shapes(profile.least),
        "trt_profile_opt_shapes": render_shapes(profile.best),
        "trt_profile_max_shapes": render_shapes(profile.most),
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_layer_norm_fp32_fallback": "1",
    }
    return [(NAMES["tensorrt"], options), *list_cuda_providers()]


def require_available(backend: OnnxBackend, available: Sequence[str]) -> None:
    """Raise BackendUnavailable if this ONNX Runtime was built without the backend.

    Asked for it all the same, some versions would warn, some raise.
    """
    if NAMES[backend] not in available:
        raise BackendUnavailable(
            f"backend {backend}: this ONNX Runtime was built with {', '.join(available)} alone: {_NEEDS[backend]}"
        )


def require_obtained(backend: OnnxBackend, obtained: str) -> None:
    """Raise BackendUnavailable if another backend than the one asked for was obtained.

    onnxruntime-gpu takes the CPU without a word where a library of CUDA's is missing.
    """
    if obtained != backend:
        raise BackendUnavailable(f"backend {backend}: ONNX Runtime fell back to {obtained}: {_NEEDS[backend]}")


def name_backend(providers: Sequence[str]) -> OnnxBackend:
    """The backend of a session's first provider, which takes all it can."""
    return next(backend for backend in get_args(OnnxBackend) if NAMES[backend] == providers[0])
