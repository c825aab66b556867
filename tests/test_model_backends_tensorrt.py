"""Execution providers of ONNX Runtime, and TensorRT engines on disk."""

import dataclasses
from ctypes.util import find_library
from pathlib import Path

import pytest
from tiny import make_contract

from model.backends.onnx_runtime import describe_machine, engine_folder, list_tensorrt_providers, require_provider
from model.contract import Contract, InputSize
from model.errors import BackendUnavailable

CONTRACT = make_contract(2, 1, 448, max_detections=2, precision="fp16", files={"network.onnx": "ab" * 32})
CACHE = Path("/cache")
PAPER = dataclasses.replace(
    CONTRACT, input_sizes=tuple(InputSize(height_px=h, width_px=w) for h, w in ((800, 1088), (1088, 800), (800, 800)))
)


@pytest.mark.parametrize(
    ("contract", "sides"),
    [(CONTRACT, ("448x448", "448x448", "448x448")), (PAPER, ("800x800", "800x1088", "1088x1088"))],
    ids=["one input size", "several"],
)
def test_tensorrt_gets_batches_of_1_8_and_32_of_all_input_sizes_with_cuda_and_cpu_as_fallback(
    contract: Contract, sides: tuple[str, ...]
) -> None:
    (name, options), *rest = list_tensorrt_providers(contract, Path("/engines/a"))
    assert name == "TensorrtExecutionProvider"
    assert (options["trt_engine_cache_path"], options["trt_fp16_enable"]) == ("/engines/a", "1")
    for shape, batch, side in zip(("min", "opt", "max"), (1, 8, 32), sides, strict=True):
        assert options[f"trt_profile_{shape}_shapes"] == f"pixels:{batch}x3x{side},sizes:{batch}x2"
    assert rest[0][1]["use_tf32"] == "0"
    assert [each for each, _ in rest] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_silent_fallback_is_an_error_that_names_both() -> None:
    with pytest.raises(BackendUnavailable, match="backend cuda: fell back to CPUExecutionProvider: install"):
        require_provider("cuda", ["CPUExecutionProvider"], "fell back to")
    require_provider("cuda", ["CUDAExecutionProvider"], "fell back to")


def test_another_machine_version_network_or_precision_has_another_folder() -> None:
    machine = {"gpu": "NVIDIA H100 80GB HBM3, 9.0", "tensorrt": "101303", "onnxruntime": "1.31.1"}
    folder = engine_folder(CONTRACT, machine, CACHE)
    assert folder.parent == CACHE
    assert folder == engine_folder(dataclasses.replace(CONTRACT, name="b"), machine, CACHE)
    assert engine_folder(dataclasses.replace(CONTRACT, files={"network.onnx": "cd" * 32}), machine, CACHE) != folder
    assert engine_folder(dataclasses.replace(CONTRACT, precision="fp32"), machine, CACHE) != folder
    for name in machine:
        assert engine_folder(CONTRACT, {**machine, name: "9.9"}, CACHE) != folder


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, "needs an NVIDIA GPU and its driver: .* No such file or directory"),
        ("exit 9", "needs an NVIDIA GPU and its driver: .* exit status 9"),
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
        describe_machine()
