"""Artifacts that run: one door to every backend, and the golden answers that each must give."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.backends.engines import find_engines, inspect_machine, name_folder
from model.backends.handover import HandoverSession
from model.backends.onnx_session import OnnxSession
from model.backends.openvino_session import OpenvinoSession
from model.backends.parity import FP16, FP32, INT8, Decisions, Tolerance, compare, decide
from model.backends.providers import (
    NAMES,
    OnnxBackend,
    Provider,
    list_cuda_providers,
    list_tensorrt_providers,
    make_profile,
    require_available,
    require_obtained,
)
from model.backends.session import Backend, Session
from model.contract import GOLDEN_FILE, NETWORK_FILE, Contract, Precision, read_contract
from model.errors import ArtifactError, BackendUnavailable, ConfigError
from model.files import read_arrays

logger = logging.getLogger(__name__)

_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": FP32,
    "fp16-stored": FP32,
    "int8-stored": FP32,
    "fp16": FP16,
    "int8": INT8,
}
_FALLBACKS: dict[Backend, Backend] = {"tensorrt": "cuda", "cuda": "cpu", "torch": "cpu", "openvino": "cpu"}


def open_session(
    artifact: Path, *, backend: Backend = "cpu", threads: int = 2, allow_fallback: bool = False
) -> tuple[Contract, Session]:
    """A checked artifact, ready to run; nothing is returned unless every check passed.

    TensorRT's engine takes minutes to build where it is not on disk: until then CUDA, or the CPU, answers (see
    `HandoverSession`). Raises ArtifactError (files), ContractMismatch (shapes), ParityError (golden answers), or
    BackendUnavailable; with `allow_fallback`, the next lesser backend is opened instead of this last one.
    """
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    contract = read_contract(artifact)
    try:
        session = _open(artifact, contract, backend, threads)
    except BackendUnavailable as error:
        if not allow_fallback or backend == "cpu":
            raise
        logger.warning("%s; going on with %s", error, _FALLBACKS[backend])
        return open_session(artifact, backend=_FALLBACKS[backend], threads=threads, allow_fallback=True)
    logger.info("opened %s %s on %s", contract.name, contract.version, session.backend)
    return contract, session


def _open(artifact: Path, contract: Contract, backend: Backend, threads: int) -> Session:
    if contract.precision == "int8" and backend != "openvino":
        raise BackendUnavailable(
            f"backend {backend}: {artifact} is of int8, which OpenVINO alone answers: take openvino"
        )
    match backend:
        case "cpu":
            return _open_onnx(artifact, contract, "cpu", threads, [(NAMES["cpu"], {})])
        case "openvino":
            return _open_openvino(artifact, contract, threads)
        case "cuda":
            return _open_onnx(artifact, contract, "cuda", threads, list_cuda_providers())
        case "tensorrt":
            return _open_tensorrt(artifact, contract, threads)
        case "torch":
            return _open_torch(artifact, contract, threads)


def _open_onnx(
    artifact: Path,
    contract: Contract,
    backend: OnnxBackend,
    threads: int,
    providers: Sequence[Provider],
    network: Path | None = None,
) -> OnnxSession:
    """A session that gives the golden answers; `network` goes before the artifact's own."""
    require_available(backend, onnxruntime.get_available_providers())
    session = OnnxSession(network or artifact / NETWORK_FILE, threads=threads, providers=providers)
    require_obtained(backend, session.backend)
    session.check_contract(contract)
    check_golden(session, artifact / GOLDEN_FILE, _TOLERANCES[contract.precision])
    return session


def _open_tensorrt(artifact: Path, contract: Contract, threads: int) -> Session:
    require_available("tensorrt", onnxruntime.get_available_providers())
    machine = inspect_machine()
    try:
        first = _open_onnx(artifact, contract, "cuda", threads, list_cuda_providers())
    except BackendUnavailable as error:
        logger.warning("%s; the CPU answers until the engine is ready", error)
        first = _open_onnx(artifact, contract, "cpu", threads, [(NAMES["cpu"], {})])
    folder = name_folder(find_engines(), contract, machine, contract.precision)
    folder.mkdir(parents=True, exist_ok=True)
    providers = list_tensorrt_providers(make_profile(contract), contract.precision, folder)
    built = folder / NETWORK_FILE
    network = built if built.is_file() else None
    return HandoverSession(first, partial(_open_onnx, artifact, contract, "tensorrt", threads, providers, network))


def _open_openvino(artifact: Path, contract: Contract, threads: int) -> Session:
    session = OpenvinoSession(artifact / contract.network_files[0], threads=threads)
    session.check_contract(contract)
    check_golden(session, artifact / GOLDEN_FILE, _TOLERANCES[contract.precision])
    return session


def _open_torch(artifact: Path, contract: Contract, threads: int) -> Session:
    try:
        from model.backends.torch_session import open_torch_session
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"backend torch: {error.name} is not installed: install useg[train]") from error
    session = open_torch_session(contract, artifact, threads=threads)
    check_golden(session, artifact / GOLDEN_FILE, session.tolerance)
    return session


def write_golden(
    session: Session, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"], path: Path
) -> None:
    """Keep pictures and what the session decides about them."""
    decisions = decide(session.run(pixels, sizes))
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, pixels=pixels, sizes=sizes, **vars(decisions))


def check_golden(session: Session, path: Path, tolerance: Tolerance = FP32) -> None:
    """Raise ParityError unless the session gives the golden answers, ArtifactError if there are none."""
    try:
        stored = read_arrays(path)
        pixels, sizes = stored.pop("pixels"), stored.pop("sizes")
        reference = Decisions(**stored)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no golden answers: {error}") from error
    compare(reference, decide(session.run(pixels, sizes)), tolerance).require(f"{path} on {session.backend}", tolerance)
