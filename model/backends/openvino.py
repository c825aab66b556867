"""OpenVINO sessions on the CPU, and imports of Intel packages without their telemetry."""

import contextlib
import json
import logging
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8

from model.contract import Contract, RawOutputs, check_shapes
from model.errors import ArtifactError, BackendUnavailable
from model.files import hash_file, replace_file

logger = logging.getLogger(__name__)

_HASHES_FILE = "sha256.json"
"""Hashes of the compiled networks in a cache folder."""
_NO_BLOBS = "{}"
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")
_CPUINFO = Path("/proc/cpuinfo")


class OpenvinoSession:
    """Runs a network in OpenVINO; all but int8 computes in fp32."""

    def __init__(
        self,
        network: Path,
        *,
        threads: int,
        streams: int = 1,
        backend: Literal["openvino", "openvino-int8"] = "openvino",
        cache: Path | None = None,
    ) -> None:
        """Up to `streams` calls run at once, each on `threads` threads. `cache` is a folder for the compiled network.

        Raises ArtifactError if OpenVINO rejects the file, BackendUnavailable if it is not installed.
        """
        self.backend = backend
        cache = _clean_cache(cache) if cache else None
        options: dict[str, object] = {
            "INFERENCE_NUM_THREADS": threads * streams,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 on some processors, with other outputs
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # the default also rounds activations next to int8 weights
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the default pins two processes to the same cores
            **({"CACHE_DIR": str(cache)} if cache else {}),
        }
        core = import_without_telemetry("openvino", "service").Core()
        try:
            self._compiled = core.compile_model(str(network), "CPU", options)
        except RuntimeError as error:
            raise ArtifactError(f"{network} was rejected by OpenVINO: {_last_line(error)}") from error
        if cache:  # also if it was cached: OpenVINO replaces the file of another network in place
            with contextlib.suppress(OSError):
                replace_file(cache / _HASHES_FILE, _hash_blobs(cache))
        self._output_names = [port.any_name for port in self._compiled.outputs]
        self._requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(streams):
            self._requests.put(self._compiled.create_infer_request())

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        inputs = {"pixels": np.ascontiguousarray(pixels), "sizes": np.ascontiguousarray(sizes)}
        request = self._requests.get()  # an infer request cannot run twice at once
        try:
            outputs = request.infer(inputs, share_inputs=True, share_outputs=False)
        finally:
            self._requests.put(request)
        arrays = [outputs[part] for part in self._output_names]
        return [RawOutputs(**dict(zip(self._output_names, row, strict=True))) for row in zip(*arrays, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the inputs and outputs of the graph differ from the contract."""
        ports = [*self._compiled.inputs, *self._compiled.outputs]
        shapes = {port.any_name: list(port.partial_shape)[1:] for port in ports}
        check_shapes(
            {name: [each.get_length() if each.is_static else None for each in shape] for name, shape in shapes.items()},
            contract,
        )


def default_compile_cache() -> Path:
    """Default folder of all compiled networks."""
    return Path.home() / ".cache" / "useg" / "compiled"


def _clean_cache(folder: Path) -> Path | None:
    """Return the folder, without compiled networks that are not as they were written; None if it is not writable.

    OpenVINO does not check the content of a compiled network: a damaged one can end the process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hashes = folder / _HASHES_FILE
        written = hashes.read_text() if hashes.is_file() else _NO_BLOBS
        if written != _hash_blobs(folder):
            logger.warning("%s is incomplete or damaged: compiling the network again", folder)
            shutil.rmtree(folder)
            folder.mkdir()
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _hash_blobs(folder: Path) -> str:
    return json.dumps({blob.name: hash_file(blob) for blob in folder.glob("*.blob")}, sort_keys=True)


def require_int8_instructions() -> None:
    """Raise BackendUnavailable if the processor has no instructions for products of int8, as far as it is known."""
    try:
        flags = next(line for line in _CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):  # not Linux, or not x86: the golden outputs decide
        return
    if not set(_INT8_FLAGS) & set(flags):
        raise BackendUnavailable("backend openvino-int8: this processor has neither VNNI nor AMX")


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_TELEMETRY = "openvino_telemetry"


def import_without_telemetry(name: Literal["openvino", "nncf"], extra: str) -> Any:
    """Import a package of Intel's without its telemetry.

    On import these packages send an event to Google Analytics and store an ID in the home folder, unless
    `openvino_telemetry` cannot be imported: so its import is blocked meanwhile. Raises BackendUnavailable, with the
    extra to install, if the package is not installed.
    """
    loaded = {_TELEMETRY: sys.modules[_TELEMETRY]} if _TELEMETRY in sys.modules else {}
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes its import fail
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{error.name} is not installed: install useg[{extra}]") from error
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(loaded)
