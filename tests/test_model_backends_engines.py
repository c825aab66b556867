"""An engine belongs to one network, one GPU and one set of versions."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest

from model.backends.engines import Machine, find_engines, name_folder, wrap_engine
from model.contract import Canvas, Contract, read_contract

MACHINE = Machine(gpu="NVIDIA H100 80GB HBM3", compute_capability="9.0", tensorrt="101303", onnxruntime="1.31.1")
CONTRACT = Contract(
    name="a",
    version="1",
    network="none",
    canvases=(Canvas.square(56),),
    stride_px=4,
    detections=2,
    thing_clusters=2,
    stuff_clusters=1,
    files={"network.onnx": "ab" * 32},
)
LIMIT_S = 60
FAKE_TRTEXEC = """#!/bin/sh
printf '%s\\n' "$@" > "$(dirname "$0")/arguments"
for each in "$@"; do case $each in --saveEngine=*) echo engine > "${each#--saveEngine=}";; esac; done
"""
FAKE_SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n"


def test_the_same_network_on_the_same_machine_has_the_same_folder() -> None:
    folder = name_folder(Path("/engines"), CONTRACT, MACHINE, "fp32")
    assert folder == name_folder(Path("/engines"), dataclasses.replace(CONTRACT, name="b"), MACHINE, "fp32")
    assert folder.parent == Path("/engines")
    assert len(folder.name) == 32


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(MACHINE, gpu="NVIDIA H200"),
        dataclasses.replace(MACHINE, compute_capability="8.0"),
        dataclasses.replace(MACHINE, tensorrt="101400"),
        dataclasses.replace(MACHINE, onnxruntime="1.32.0"),
    ],
    ids=["gpu", "compute capability", "TensorRT", "ONNX Runtime"],
)
def test_anything_else_about_the_machine_is_another_folder(other: Machine) -> None:
    root = Path("/engines")
    assert name_folder(root, CONTRACT, MACHINE, "fp32") != name_folder(root, CONTRACT, other, "fp32")


def test_another_network_or_precision_is_another_folder() -> None:
    folder = name_folder(Path(), CONTRACT, MACHINE, "fp32")
    changed = dataclasses.replace(CONTRACT, files={"network.onnx": "cd" * 32})
    assert name_folder(Path(), changed, MACHINE, "fp32") != folder
    assert name_folder(Path(), CONTRACT, MACHINE, "fp16") != folder


def test_a_built_engine_is_one_node_with_the_inputs_and_outputs_of_its_network(
    tmp_path: Path, tiny_artifact: Path
) -> None:
    network = tiny_artifact / "network.onnx"
    wrapped = onnx.load(wrap_engine(network, tmp_path))
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
    folder = name_folder(engines, read_contract(tiny_artifact), machine, "fp16-stored")
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


def test_without_trtexec_or_a_gpu_the_script_says_what_is_missing(
    tmp_path: Path, repository: Path, tiny_artifact: Path
) -> None:
    ended = run_script(repository, tmp_path, tiny_artifact)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("engine.sh: trtexec was not found: install TensorRT 10")
    write_program(tmp_path / "trtexec", FAKE_TRTEXEC)
    write_program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    ended = run_script(repository, tmp_path, tiny_artifact)
    assert ended.stderr.startswith("engine.sh: nvidia-smi names no GPU")
    write_program(tmp_path / "nvidia-smi", FAKE_SMI)
    ended = run_script(repository, tmp_path, "--engines", tmp_path / "engines", tiny_artifact)
    if ended.returncode:  # a machine without TensorRT
        assert ended.stderr.startswith("engine.sh: libnvinfer.so.10 cannot be loaded: install TensorRT 10")
    assert run_script(repository, tmp_path).returncode == 2


def test_engines_are_kept_in_the_users_cache() -> None:
    assert find_engines().parts[-3:] == (".cache", "useg", "engines")
