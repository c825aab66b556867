"""Loads artifacts on a backend, and compares their golden outputs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from jaxtyping import Int64, UInt8

from model.backends.onnx_runtime import (
    CACHE_KEY_LENGTH,
    CPU_PROVIDERS,
    OnnxBackend,
    OnnxSession,
    Provider,
    describe_machine,
    engine_folder,
    list_cuda_providers,
    list_tensorrt_providers,
    require_provider,
)
from model.backends.openvino import OpenvinoSession, default_compile_cache, require_int8_instructions
from model.backends.parity import (
    FP16_TOLERANCE,
    FP32_TOLERANCE,
    INT8_TOLERANCE,
    DecodedOutputs,
    Tolerance,
    decode_outputs,
    require_equal_outputs,
)
from model.backends.session import AutoSession, Backend, ConcreteBackend, HotSwapSession, Session
from model.contract import (
    GOLDEN_FILE,
    INT8_FILES,
    INT8_GOLDEN_FILE,
    NETWORK_FILE,
    Contract,
    read_contract,
)
from model.errors import ArtifactError, BackendUnavailable, UsegError
from model.files import load_npz

logger = logging.getLogger(__name__)

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
    `AutoSession`. A TensorRT engine that is not on disk takes minutes to build; until then CUDA is used
    (see `HotSwapSession`). Up to `streams` calls run at once on a CPU, each on `threads` threads; in ONNX Runtime they
    share all threads. OpenVINO stores what it compiled in the folder `compile_cache`, if that is given; TensorRT stores
    its engines there or in the default one.
    Raises ArtifactError (files), ContractMismatch (shapes), ParityError (golden outputs) or BackendUnavailable.
    """
    contract = read_contract(artifact)
    loader = _Loader(
        artifact=artifact, contract=contract, threads=threads, streams=streams, compile_cache=compile_cache
    )
    session = load_fastest(loader.load) if backend == "auto" else loader.load(backend)
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


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """Loads an artifact on any backend; the parameters are those of `load_session`."""

    artifact: Path
    contract: Contract
    threads: int
    streams: int
    compile_cache: Path | None

    @property
    def _tolerance(self) -> Tolerance:
        return FP16_TOLERANCE if self.contract.precision == "fp16" else FP32_TOLERANCE

    def load(self, backend: ConcreteBackend) -> Session:
        """Load the network and check its shapes and golden outputs."""
        match backend:
            case "cpu":
                return self._load_onnx("cpu", CPU_PROVIDERS, self.threads * self.streams)
            case "cuda":
                return self._load_onnx("cuda", list_cuda_providers(), self.threads)
            case "tensorrt":
                return self._load_tensorrt()
            case "openvino" | "openvino-int8":
                return self._load_openvino(backend)
            case "torch":
                return self._load_torch()

    def _load_onnx(self, backend: OnnxBackend, providers: Sequence[Provider], threads: int) -> OnnxSession:
        session = OnnxSession(self.artifact / NETWORK_FILE, threads=threads, backend=backend, providers=providers)
        session.check_contract(self.contract)
        check_golden(session, self.artifact / GOLDEN_FILE, self._tolerance)
        return session

    def _load_tensorrt(self) -> Session:
        require_provider("tensorrt", onnxruntime.get_available_providers(), "this ONNX Runtime only has")
        folder = engine_folder(self.contract, describe_machine(), self.compile_cache or default_compile_cache())
        first = self.load("cuda")
        folder.mkdir(parents=True, exist_ok=True)
        providers = list_tensorrt_providers(self.contract, folder)
        return HotSwapSession(first, partial(self._load_onnx, "tensorrt", providers, self.threads))

    def _load_openvino(self, backend: Literal["openvino", "openvino-int8"]) -> Session:
        network, golden, tolerance = NETWORK_FILE, GOLDEN_FILE, self._tolerance
        if backend == "openvino-int8":
            if self.contract.int8 is None:
                raise BackendUnavailable("the artifact has no int8 network: add one by `useg quantize`")
            require_int8_instructions()
            network, golden, tolerance = INT8_FILES[0], INT8_GOLDEN_FILE, INT8_TOLERANCE
        session = OpenvinoSession(
            self.artifact / network,
            threads=self.threads,
            streams=self.streams,
            backend=backend,
            cache=self.compile_cache / self.contract.files[network][:CACHE_KEY_LENGTH] if self.compile_cache else None,
        )
        session.check_contract(self.contract)
        check_golden(session, self.artifact / golden, tolerance)
        return session

    def _load_torch(self) -> Session:
        try:
            from model.backends.torch_session import load_torch_session
        except ModuleNotFoundError as error:
            raise BackendUnavailable(f"backend torch: {error.name} is not installed: install useg[train]") from error
        session = load_torch_session(self.contract, self.artifact, threads=self.threads)
        check_golden(session, self.artifact / GOLDEN_FILE, session.tolerance)
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
    require_equal_outputs(reference, session.run(pixels, sizes), f"{path} on {session.backend}", tolerance)
