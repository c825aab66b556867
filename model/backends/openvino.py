"""A network in OpenVINO on the CPU, behind the protocol of every session."""

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
    """A network of any precision; what is not int8 is computed in fp32."""

    backend = "openvino"

    def __init__(self, network: Path, *, threads: int) -> None:
        """Raises ArtifactError if OpenVINO refuses the file, BackendUnavailable if it is not installed."""
        core = import_openvino().Core()
        try:
            self._compiled = core.compile_model(core.read_model(network), "CPU", _compile_options(threads))
        except RuntimeError as error:
            raise ArtifactError(f"{network} was refused by OpenVINO: {_last_line(error)}") from error
        self._request = self._compiled.create_infer_request()
        self._lock = Lock()

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        given = {"pixels": np.ascontiguousarray(pixels), "sizes": np.ascontiguousarray(sizes)}
        with self._lock:  # a request takes no second run before its first has ended
            outputs = self._request.infer(given, share_inputs=True, share_outputs=False)
        arrays = [outputs[part] for part in OUTPUT_NAMES]
        return [RawOutputs(**dict(zip(OUTPUT_NAMES, row, strict=True))) for row in zip(*arrays, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the graph's inputs and outputs are not what the contract says."""
        ports = [*self._compiled.inputs, *self._compiled.outputs]
        shapes = {port.any_name: list(port.partial_shape)[1:] for port in ports}
        check_shapes(
            {name: [each.get_length() if each.is_static else None for each in shape] for name, shape in shapes.items()},
            contract,
        )


def _compile_options(threads: int) -> dict[str, object]:
    """By their names as OpenVINO's documentation lists them."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the processor has it, and other answers than elsewhere
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else what meets weights stored in int8 is rounded, too
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # else two processes pin themselves to the same cores
    }


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The package `openvino`; see `import_without_telemetry`."""
    return import_without_telemetry("openvino", "backend openvino", "openvino")


def import_nncf() -> Any:
    """The package `nncf`; see `import_without_telemetry`."""
    return import_without_telemetry("nncf", "quantise", "quantise")


def import_without_telemetry(name: str, purpose: str, extra: str) -> Any:
    """A package of Intel's that tells nobody of it.

    At their import these send an event to Google Analytics and leave an identity in the home folder, unless they find
    no `openvino_telemetry`: so none can be found meanwhile. Raises BackendUnavailable, with the extra to install, if
    the package is not there.
    """
    held = {_TELEMETRY: sys.modules[_TELEMETRY]} if _TELEMETRY in sys.modules else {}
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{purpose}: {error.name} is not installed: install useg[{extra}]") from error
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(held)
