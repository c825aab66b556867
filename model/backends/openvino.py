"""OpenVINO sessions on the CPU, and imports of Intel packages without their telemetry."""

import sys
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from model.contract import Contract
from model.errors import ArtifactError, BackendUnavailable
from model.network_io import OUTPUT_NAMES, RawOutputs, check_shapes


class OpenvinoSession:
    """Runs a network of any precision in OpenVINO; all but int8 computes in fp32."""

    backend = "openvino"

    def __init__(self, network: Path, *, threads: int) -> None:
        """Raises ArtifactError if OpenVINO rejects the file, BackendUnavailable if it is not installed."""
        core = import_openvino().Core()
        try:
            self._compiled = core.compile_model(core.read_model(network), "CPU", _compile_options(threads))
        except RuntimeError as error:
            raise ArtifactError(f"{network} was rejected by OpenVINO: {_last_line(error)}") from error
        self._request = self._compiled.create_infer_request()
        self._lock = Lock()

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        inputs = {"pixels": np.ascontiguousarray(pixels), "sizes": np.ascontiguousarray(sizes)}
        with self._lock:  # an infer request cannot run twice at once
            outputs = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        arrays = [outputs[part] for part in OUTPUT_NAMES]
        return [RawOutputs(**dict(zip(OUTPUT_NAMES, row, strict=True))) for row in zip(*arrays, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the inputs and outputs of the graph differ from the contract."""
        ports = [*self._compiled.inputs, *self._compiled.outputs]
        shapes = {port.any_name: list(port.partial_shape)[1:] for port in ports}
        check_shapes(
            {name: [each.get_length() if each.is_static else None for each in shape] for name, shape in shapes.items()},
            contract,
        )


def _compile_options(threads: int) -> dict[str, object]:
    """Options by the names in OpenVINO's documentation."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 on some processors, with other outputs
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # the default also rounds activations next to int8 weights
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the default pins two processes to the same cores
    }


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Import `openvino`; see `import_without_telemetry`."""
    return import_without_telemetry("openvino", "backend openvino", "openvino")


def import_nncf() -> Any:
    """Import `nncf`; see `import_without_telemetry`."""
    return import_without_telemetry("nncf", "quantize", "quantize")


def import_without_telemetry(name: str, purpose: str, extra: str) -> Any:
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
        raise BackendUnavailable(f"{purpose}: {error.name} is not installed: install useg[{extra}]") from error
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(loaded)
