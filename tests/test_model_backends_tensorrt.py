"""Execution providers of ONNX Runtime, and TensorRT engines on disk."""

import dataclasses
from ctypes.util import find_library
from pathlib import Path

import pytest
from tiny import make_contract

from model.backends.onnx_runtime import (
    backend_of,
    list_tensorrt_providers,
    make_optimization_profile,
    require_provider_active,
)
from model.backends.tensorrt import EngineKey, detect_engine_key, engine_folder
from model.contract import Contract, InputSize
from model.errors import BackendUnavailable

CONTRACT = make_contract(2, 1, 448, max_detections=2)
PAPER = dataclasses.replace(
    CONTRACT, input_sizes=tuple(InputSize(height_px=h, width_px=w) for h, w in ((800, 1088), (1088, 800), (800, 800)))
)


@pytest.mark.parametrize(
    ("contract", "sides"),
    [(CONTRACT, ("448x448", "448x448", "448x448")), (PAPER, ("800x800", "800x1088", "1088x1088"))],
    ids=["one input size", "several"],
)
def test_the_profile_has_batches_of_1_8_and_32_and_spans_all_input_sizes(
    contract: Contract, sides: tuple[str, ...]
) -> None:
    assert make_optimization_profile(contract) == {
        name: f"pixels:{batch}x3x{side},sizes:{batch}x2"
        for name, batch, side in zip(("min", "opt", "max"), (1, 8, 32), sides, strict=True)
    }


def test_tensorrt_gets_profile_and_folder_with_cuda_and_cpu_as_fallback() -> None:
    (name, options), *rest = list_tensorrt_providers(make_optimization_profile(CONTRACT), "fp16", Path("/engines/a"))
    assert name == "TensorrtExecutionProvider"
    assert options["trt_engine_cache_path"] == "/engines/a"
    assert options["trt_profile_opt_shapes"] == "pixels:8x3x448x448,sizes:8x2"
    assert options["trt_fp16_enable"] == "1"
    assert rest[0][1]["use_tf32"] == "0"
    assert [each for each, _ in rest] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("requested", "providers", "obtained"),
    [
        ("cuda", ["CPUExecutionProvider"], "cpu"),
        ("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
    ],
)
def test_a_silent_fallback_is_an_error_that_names_both(requested: str, providers: list[str], obtained: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"backend {requested}: ONNX Runtime fell back to {obtained}: install"):
        require_provider_active(requested, backend_of(providers))  # type: ignore[arg-type]


MACHINE = EngineKey(gpu="NVIDIA H100 80GB HBM3", compute_capability="9.0", tensorrt="101303", onnxruntime="1.31.1")
ENGINE_CONTRACT = make_contract(2, 1, 56, max_detections=2, files={"network.onnx": "ab" * 32})


def test_another_machine_version_network_or_precision_has_another_folder() -> None:
    folder = engine_folder(Path(), ENGINE_CONTRACT, MACHINE, "fp32")
    assert folder == engine_folder(Path(), dataclasses.replace(ENGINE_CONTRACT, name="b"), MACHINE, "fp32")
    changed = dataclasses.replace(ENGINE_CONTRACT, files={"network.onnx": "cd" * 32})
    assert engine_folder(Path(), changed, MACHINE, "fp32") != folder
    assert engine_folder(Path(), ENGINE_CONTRACT, MACHINE, "fp16") != folder
    for name in ("gpu", "compute_capability", "tensorrt", "onnxruntime"):
        other = dataclasses.replace(MACHINE, **{name: "9.9"})
        assert engine_folder(Path(), ENGINE_CONTRACT, other, "fp32") != folder


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, "nvidia-smi was not found: TensorRT needs an NVIDIA GPU"),
        ("exit 9", "nvidia-smi reports no GPU"),
        ("echo 'NVIDIA H100 80GB HBM3, 9.0'", r"libnvinfer\.so\.10 cannot be loaded: install TensorRT 10"),
    ],
)
def test_a_missing_gpu_or_library_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    if find_library("nvinfer"):
        pytest.skip("this machine has TensorRT")
    if program:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match=message):
        detect_engine_key()
