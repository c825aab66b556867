"""Execution providers of ONNX Runtime, and TensorRT engines on disk."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from tiny import make_contract

from model.backends.onnx_runtime import (
    backend_of,
    list_tensorrt_providers,
    make_optimization_profile,
    require_provider_active,
    require_provider_available,
)
from model.backends.tensorrt import EngineKey, engine_folder, make_ep_context_model
from model.contract import Contract, InputSize, read_contract
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


def test_a_build_without_the_backend_is_reported_with_what_to_install() -> None:
    with pytest.raises(BackendUnavailable, match=r"backend cuda: .* only has CPUExecutionProvider: .*service-gpu"):
        require_provider_available("cuda", ["CPUExecutionProvider"])
    require_provider_available("cuda", ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"])


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
LIMIT_S = 60
FAKE_TRTEXEC = """#!/bin/sh
printf '%s\\n' "$@" > "$(dirname "$0")/arguments"
for each in "$@"; do case $each in --saveEngine=*) echo engine > "${each#--saveEngine=}";; esac; done
"""
FAKE_SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n"


def test_another_machine_version_network_or_precision_has_another_folder() -> None:
    folder = engine_folder(Path(), ENGINE_CONTRACT, MACHINE, "fp32")
    assert folder == engine_folder(Path(), dataclasses.replace(ENGINE_CONTRACT, name="b"), MACHINE, "fp32")
    changed = dataclasses.replace(ENGINE_CONTRACT, files={"network.onnx": "cd" * 32})
    assert engine_folder(Path(), changed, MACHINE, "fp32") != folder
    assert engine_folder(Path(), ENGINE_CONTRACT, MACHINE, "fp16") != folder
    for name in ("gpu", "compute_capability", "tensorrt", "onnxruntime"):
        other = dataclasses.replace(MACHINE, **{name: "9.9"})
        assert engine_folder(Path(), ENGINE_CONTRACT, other, "fp32") != folder


def test_the_graph_of_an_engine_is_one_node_with_the_same_inputs_and_outputs(
    tmp_path: Path, tiny_artifact: Path
) -> None:
    network = tiny_artifact / "network.onnx"
    wrapped = onnx.load(make_ep_context_model(network, tmp_path))
    original = onnx.load(network)
    assert [each.op_type for each in wrapped.graph.node] == ["EPContext"]
    assert {each.name: onnx.helper.get_attribute_value(each) for each in wrapped.graph.node[0].attribute} == {
        "embed_mode": 0,
        "ep_cache_context": b"network.engine",
        "main_context": 1,
        "source": b"TensorrtExecutionProvider",
    }
    assert list(wrapped.graph.input) == list(original.graph.input)
    assert list(wrapped.graph.output) == list(original.graph.output)
    assert list(wrapped.metadata_props) == list(original.metadata_props)


def write_program(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


def run_script(repository: Path, programs: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "PYTHON": sys.executable}
    command = [repository / "deploy" / "engine.sh", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S, env=environment, cwd=repository,
        check=False,
    )  # fmt: skip


def test_the_script_builds_the_engine_where_the_service_looks_for_it(
    tmp_path: Path, repository: Path, tiny_artifact: Path
) -> None:
    programs, engines = tmp_path / "bin", tmp_path / "engines"
    programs.mkdir()
    write_program(programs / "trtexec", FAKE_TRTEXEC)
    write_program(programs / "nvidia-smi", FAKE_SMI)
    ended = run_script(repository, programs, "--engines", engines, "--tensorrt", "101303", tiny_artifact)
    assert ended.returncode == 0, ended.stderr
    machine = dataclasses.replace(MACHINE, onnxruntime=onnxruntime.__version__)
    folder = engine_folder(engines, read_contract(tiny_artifact), machine, "fp16-stored")
    assert ended.stdout == f"{folder}/network.engine\n"
    assert sorted(path.name for path in folder.iterdir()) == ["network.engine", "network.onnx"]
    assert (programs / "arguments").read_text().splitlines() == [
        f"--onnx={tiny_artifact}/network.onnx",
        f"--saveEngine={folder}/network.engine.part",
        "--noTF32",
        "--skipInference",
        "--minShapes=pixels:1x3x56x56,sizes:1x2",
        "--optShapes=pixels:8x3x56x56,sizes:8x2",
        "--maxShapes=pixels:32x3x56x56,sizes:32x2",
        f"--timingCacheFile={folder}/timing.cache",
    ]


def test_fp16_is_refused_for_an_artifact_that_computes_in_fp32(
    tmp_path: Path, repository: Path, tiny_artifact: Path
) -> None:
    write_program(tmp_path / "trtexec", FAKE_TRTEXEC)
    ended = run_script(repository, tmp_path, "--fp16", tiny_artifact)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "computes in fp16-stored" in ended.stderr


def test_a_failed_build_leaves_no_engine(tmp_path: Path, repository: Path, tiny_artifact: Path) -> None:
    write_program(tmp_path / "trtexec", "#!/bin/sh\nexit 1\n")
    write_program(tmp_path / "nvidia-smi", FAKE_SMI)
    ended = run_script(repository, tmp_path, "--engines", tmp_path / "e", "--tensorrt", "1", tiny_artifact)
    assert ended.returncode == 1
    assert "trtexec failed" in ended.stderr
    assert list((tmp_path / "e").rglob("*.engine")) == []


def test_the_script_reports_a_missing_trtexec_or_gpu(tmp_path: Path, repository: Path, tiny_artifact: Path) -> None:
    ended = run_script(repository, tmp_path, tiny_artifact)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("engine.sh: trtexec was not found: install TensorRT 10")
    write_program(tmp_path / "trtexec", FAKE_TRTEXEC)
    write_program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    ended = run_script(repository, tmp_path, tiny_artifact)
    assert ended.stderr.startswith("engine.sh: nvidia-smi reports no GPU")
    write_program(tmp_path / "nvidia-smi", FAKE_SMI)
    ended = run_script(repository, tmp_path, "--engines", tmp_path / "engines", tiny_artifact)
    if ended.returncode:  # a machine without TensorRT
        assert ended.stderr.startswith("engine.sh: libnvinfer.so.10 cannot be loaded: install TensorRT 10")
    assert run_script(repository, tmp_path).returncode == 2
