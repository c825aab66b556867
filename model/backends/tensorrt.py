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
from model.files import atomic_write

ENGINE_FILE = "network.engine"
"""Engine file that trtexec builds."""
_INFER_LIBRARY = "libnvinfer.so.10"
_NVIDIA_SMI = "nvidia-smi"
_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0")
_KEY_LENGTH = 32
_TIMEOUT_S = 30.0
_OPSET = 18


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


def detect_engine_key(tensorrt: str | None = None) -> EngineKey:
    """Detect the first GPU and the library versions; `tensorrt` overrides the version of the installed library.

    Raises BackendUnavailable if there is no GPU or no TensorRT.
    """
    name, capability = _query_gpu()
    return EngineKey(
        gpu=name,
        compute_capability=capability,
        tensorrt=tensorrt or _read_tensorrt_version(),
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


def make_ep_context_model(network: Path, folder: Path) -> Path:
    """Write a graph in `folder` that runs the engine there, so that TensorRT does not build one.

    It consists of one node, ONNX Runtime's EPContext (com.microsoft), which refers to the engine by file name.
    """
    import onnx  # not installed with the service

    model = onnx.load(network)
    graph = model.graph
    node = onnx.helper.make_node(
        "EPContext",
        [each.name for each in graph.input],
        [each.name for each in graph.output],
        name="engine",
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context=ENGINE_FILE,
        main_context=1,
        source="TensorrtExecutionProvider",
    )
    wrapped = onnx.helper.make_graph([node], "engine", list(graph.input), list(graph.output))
    domains = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    whole = onnx.helper.make_model(wrapped, opset_imports=domains)
    whole.metadata_props.extend(model.metadata_props)
    path = folder / NETWORK_FILE
    with atomic_write(path) as sibling:
        sibling.write_bytes(whole.SerializeToString())
    return path
