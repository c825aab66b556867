"""TensorRT engines on disk, each for one network, GPU and set of library versions."""

import ctypes
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import onnxruntime

from model.contract import NETWORK_FILE, Contract
from model.errors import BackendUnavailable

_INFER_LIBRARY = "libnvinfer.so.10"
_NVIDIA_SMI = "nvidia-smi"
_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0")
_KEY_LENGTH = 32
_TIMEOUT_S = 30.0


def engine_folder(contract: Contract, machine: dict[str, str]) -> Path:
    """Folder of the engines of one network on one machine; each network, version and GPU has its own."""
    parts = {"network": contract.files[NETWORK_FILE], "precision": contract.precision, **machine}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Path.home() / ".cache" / "useg" / "engines" / key[:_KEY_LENGTH]


def describe_machine() -> dict[str, str]:
    """Return the GPU and versions that engines depend on. Raises BackendUnavailable if there is no GPU or TensorRT."""
    return {"gpu": _query_gpu(), "tensorrt": _read_tensorrt_version(), "onnxruntime": onnxruntime.__version__}


def _query_gpu() -> str:
    """Name and compute capability of the first GPU."""
    program = shutil.which(_NVIDIA_SMI)
    if program is None:
        raise BackendUnavailable(f"{_NVIDIA_SMI} was not found: TensorRT needs an NVIDIA GPU and its driver")
    try:
        return subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailable(f"{_NVIDIA_SMI} reports no GPU: {error}") from error


def _read_tensorrt_version() -> str:
    """Version of the installed TensorRT, such as "101303" for 10.13.3."""
    try:
        library = ctypes.CDLL(_INFER_LIBRARY)
    except OSError as error:
        raise BackendUnavailable(
            f"{_INFER_LIBRARY} cannot be loaded: install TensorRT 10, or use NVIDIA's image ({error})"
        ) from error
    return str(library.getInferLibVersion())
