"""Loads artifacts on a backend, and compares their golden outputs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.backends.onnx_runtime import (
    PROVIDER_NAMES,
    OnnxBackend,
    OnnxSession,
    Provider,
    list_cuda_providers,
    list_tensorrt_providers,
    make_optimization_profile,
    require_provider_active,
    require_provider_available,
)
from model.backends.openvino import load_openvino_session, require_int8_instructions
from model.backends.parity import (
    FP16_TOLERANCE,
    FP32_TOLERANCE,
    INT8_TOLERANCE,
    DecodedOutputs,
    Tolerance,
    compare_outputs,
    decode_outputs,
)
from model.backends.session import AutoSession, Backend, ConcreteBackend, HotSwapSession, Session
from model.backends.tensorrt import default_engine_cache, detect_engine_key, engine_folder
from model.contract import (
    GOLDEN_FILE,
    INT8_FILES,
    INT8_GOLDEN_FILE,
    NETWORK_FILE,
    Contract,
    Precision,
    read_contract,
)
from model.errors import ArtifactError, BackendUnavailable, ConfigError, UsegError
from model.files import load_npz

logger = logging.getLogger(__name__)

_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": FP32_TOLERANCE,
    "fp16-stored": FP32_TOLERANCE,
    "int8-stored": FP32_TOLERANCE,
    "fp16": FP16_TOLERANCE,
}
_FASTEST_FIRST: tuple[ConcreteBackend, ...] = ("tensorrt", "cuda", "openvino-int8", "openvino")
"""Backends that "auto" tries; if none works, it takes the last of all, "cpu"."""


def load_session(
    artifact: Path,
    *,
    backend: Backend = "cpu",
    threads: int = 2,
    streams: int = 1,
    compile_cache: Path | None = None,
) -> tuple[Contract, Session]:
    """Load an artifact on a backend, and check files, shapes and golden outputs.

    Backend "auto" is the fastest one that is available and reproduces the golden outputs; the session is then an
    `AutoSession`. A TensorRT engine that is not on disk takes minutes to build; until then CUDA, or the CPU, is used
    (see `HotSwapSession`). Up to `streams` calls run at once on a CPU, each on `threads` threads; in ONNX Runtime they
    share all threads. OpenVINO stores what it compiled in the folder `compile_cache`, if that is given.
    Raises ArtifactError (files), ContractMismatch (shapes), ParityError (golden outputs) or BackendUnavailable.
    """
    if threads < 1 or streams < 1:
        raise ConfigError(f"threads and streams must be at least 1, got {threads} and {streams}")
    contract = read_contract(artifact)
    load = partial(_load, artifact, contract, threads, streams, compile_cache)
    session = load_fastest(load) if backend == "auto" else load(backend)
    logger.info("loaded %s %s on %s", contract.name, contract.version, session.backend)
    return contract, session


def load_fastest(load: Callable[[ConcreteBackend], Session]) -> AutoSession:
    """Return the session of the fastest backend that `load` can load. Raises the error of the last one, "cpu"."""
    skipped: dict[str, str] = {}
    for backend in _FASTEST_FIRST:
        try:
            return AutoSession(session=load(backend), skipped_backends=skipped)
        except Exception as error:  # libraries of a backend may raise anything, and the next one may work
            is_ours = isinstance(error, UsegError)
            message = (str(error) if is_ours else f"{type(error).__name__}: {error}").splitlines()[0]
            skipped[backend] = message.removeprefix(f"backend {backend}: ")
            # Missing hardware is normal; any other failure, such as different outputs, should be noticed.
            level = logging.INFO if isinstance(error, BackendUnavailable) else logging.WARNING
            logger.log(level, "skipping backend %s: %s", backend, skipped[backend])
    return AutoSession(session=load("cpu"), skipped_backends=skipped)


def _load(
    artifact: Path, contract: Contract, threads: int, streams: int, compile_cache: Path | None, backend: ConcreteBackend
) -> Session:
    match backend:
        case "cpu":
            return _load_onnx(artifact, contract, "cpu", threads * streams, [(PROVIDER_NAMES["cpu"], {})])
        case "openvino":
            return _load_openvino(artifact, contract, threads, streams, compile_cache)
        case "openvino-int8":
            return _load_openvino_int8(artifact, contract, threads, streams, compile_cache)
        case "cuda":
            return _load_onnx(artifact, contract, "cuda", threads, list_cuda_providers())
        case "tensorrt":
            return _load_tensorrt(artifact, contract, threads)
        case "torch":
            return _load_torch(artifact, contract, threads)


def _load_onnx(
    artifact: Path,
    contract: Contract,
    backend: OnnxBackend,
    threads: int,
    providers: Sequence[Provider],
) -> OnnxSession:
    require_provider_available(backend, onnxruntime.get_available_providers())
    session = OnnxSession(artifact / NETWORK_FILE, threads=threads, providers=providers)
    require_provider_active(backend, session.backend)
    session.check_contract(contract)
    check_golden(session, artifact / GOLDEN_FILE, _TOLERANCES[contract.precision])
    return session


def _load_tensorrt(artifact: Path, contract: Contract, threads: int) -> Session:
    require_provider_available("tensorrt", onnxruntime.get_available_providers())
    key = detect_engine_key()
    try:
        first = _load_onnx(artifact, contract, "cuda", threads, list_cuda_providers())
    except BackendUnavailable as error:
        logger.warning("%s; using the CPU until the engine is ready", error)
        first = _load_onnx(artifact, contract, "cpu", threads, [(PROVIDER_NAMES["cpu"], {})])
    folder = engine_folder(default_engine_cache(), contract, key, contract.precision)
    folder.mkdir(parents=True, exist_ok=True)
    providers = list_tensorrt_providers(make_optimization_profile(contract), contract.precision, folder)
    return HotSwapSession(first, partial(_load_onnx, artifact, contract, "tensorrt", threads, providers))


def _load_openvino(artifact: Path, contract: Contract, threads: int, streams: int, cache: Path | None) -> Session:
    check = partial(check_golden, path=artifact / GOLDEN_FILE, tolerance=_TOLERANCES[contract.precision])
    return load_openvino_session(
        artifact / NETWORK_FILE, contract, check, threads=threads, streams=streams, cache=cache
    )


def _load_openvino_int8(artifact: Path, contract: Contract, threads: int, streams: int, cache: Path | None) -> Session:
    if contract.int8 is None:
        raise BackendUnavailable("backend openvino-int8: the artifact has no int8 network: add one by `useg quantize`")
    require_int8_instructions()
    check = partial(check_golden, path=artifact / INT8_GOLDEN_FILE, tolerance=INT8_TOLERANCE)
    return load_openvino_session(
        artifact / INT8_FILES[0], contract, check, threads=threads, streams=streams, precision="int8", cache=cache
    )


def _load_torch(artifact: Path, contract: Contract, threads: int) -> Session:
    try:
        from model.backends.torch_session import load_torch_session
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"backend torch: {error.name} is not installed: install useg[train]") from error
    session = load_torch_session(contract, artifact, threads=threads)
    check_golden(session, artifact / GOLDEN_FILE, session.tolerance)
    return session


def write_golden(
    session: Session, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"], path: Path
) -> None:
    """Store images and the thresholded outputs of the session."""
    outputs = decode_outputs(session.run(pixels, sizes))
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, pixels=pixels, sizes=sizes, **vars(outputs))


def check_golden(session: Session, path: Path, tolerance: Tolerance = FP32_TOLERANCE) -> None:
    """Raise ParityError unless the session reproduces the golden outputs, ArtifactError if there are none."""
    try:
        stored = load_npz(path)
        pixels, sizes = stored.pop("pixels"), stored.pop("sizes")
        reference = DecodedOutputs(**stored)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not contain golden outputs: {error}") from error
    compare_outputs(reference, decode_outputs(session.run(pixels, sizes)), tolerance).require(
        f"{path} on {session.backend}", tolerance
    )
