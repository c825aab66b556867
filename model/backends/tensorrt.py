"""TensorRT engines on disk, each for one network, GPU and set of library versions."""

import ctypes
import hashlib
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from model.contract import NETWORK_FILE, Contract, Precision
from model.errors import BackendUnavailable

_INFER_LIBRARY = "libnvinfer.so.10"
_NVIDIA_SMI = "nvidia-smi"
_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0")
_KEY_LENGTH = 32
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """GPU and versions that an engine depends on, apart from its network."""

    gpu: str
    compute_capability: str
    tensorrt: str
    onnxruntime: str


def default_engine_cache() -> Path:
    """Default folder of all engines."""
    return Path.home() / ".cache" / "useg" / "engines"


def engine_folder(root: Path, contract: Contract, machine: EngineKey, precision: Precision) -> Path:
    """Folder of the engines of one network on one machine; each network, version and GPU has its own."""
    parts = {"network": contract.files[NETWORK_FILE], "precision": precision, **asdict(machine)}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return root / key[:_KEY_LENGTH]


def detect_engine_key() -> EngineKey:
    """Detect the first GPU and the library versions. Raises BackendUnavailable if there is no GPU or no TensorRT."""
    name, capability = _query_gpu()
    return EngineKey(
        gpu=name,
        compute_capability=capability,
        tensorrt=_read_tensorrt_version(),
        onnxruntime=onnxruntime.__version__,
    )


def _query_gpu() -> tuple[str, str]:
    """Name and compute capability of the first GPU."""
    program = shutil.which(_NVIDIA_SMI)
    if program is None:
        raise BackendUnavailable(f"{_NVIDIA_SMI} was not found: TensorRT needs an NVIDIA GPU and its driver")
    try:
        output = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        ).stdout
        name, capability = output.strip().rsplit(", ", 1)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise BackendUnavailable(f"{_NVIDIA_SMI} reports no GPU: {error}") from error
    return name, capability


def _read_tensorrt_version() -> str:
    """Version of the installed TensorRT, such as "101303" for 10.13.3."""
    try:
        library = ctypes.CDLL(_INFER_LIBRARY)
    except OSError as error:
        raise BackendUnavailable(
            f"{_INFER_LIBRARY} cannot be loaded: install TensorRT 10, or use NVIDIA's image ({error})"
        ) from error
    return str(library.getInferLibVersion())
