"""Loading an artifact checks files, shapes and golden outputs, on every backend."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny import FixedSession

from model.backends.loader import check_golden, load_fastest, load_session, write_golden
from model.backends.onnx_runtime import PROVIDER_NAMES
from model.backends.parity import FP32_TOLERANCE, require_equal_outputs
from model.backends.session import AutoSession, Backend, ConcreteBackend, HotSwapSession, Session
from model.contract import Contract, RawOutputs
from model.detail import NetworkInput
from model.errors import ArtifactError, BackendUnavailable, ContractMismatch, ParityError
from model.export.export import draw_scene
from model.export.parity_checks import stack_images
from model.files import hash_file

PIXELS = np.zeros((2, 3, 8, 8), np.uint8)
SIZES = np.array([[8, 8], [8, 4]])


def make_outputs(score: float = 0.9, cluster: int = 1, mask: float = 0.8, weak_mask: float = 0.2) -> RawOutputs:
    """One confident detection and one far below any threshold."""
    masks = np.zeros((2, 8, 8), np.float32)
    masks[0, :4], masks[1] = mask, weak_mask
    semantic = np.zeros((3, 8, 8), np.float32)
    semantic[2, :, 4:] = 1.0
    return RawOutputs(
        scores=np.array([score, 0.01], np.float32),
        clusters=np.array([cluster, 0]),
        boxes=np.zeros((2, 4), np.float32),
        masks=masks,
        semantic=semantic,
    )


@pytest.fixture
def golden_file(tmp_path: Path) -> Path:
    """Golden outputs of `make_outputs()`."""
    path = tmp_path / "golden.npz"
    write_golden(FixedSession(make_outputs()), PIXELS, SIZES, path)
    return path


@pytest.mark.parametrize(
    "output", [make_outputs(score=0.9 + 0.9 * FP32_TOLERANCE.max_score_difference), make_outputs(weak_mask=0.9)]
)
def test_a_score_within_the_tolerance_and_masks_of_weak_detections_may_differ(
    golden_file: Path, output: RawOutputs
) -> None:
    check_golden(FixedSession(output), golden_file)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (make_outputs(score=0.9 + 1.5 * FP32_TOLERANCE.max_score_difference), "score_difference 0.0015"),
        (make_outputs(score=np.nan), "score_difference nan"),
        (make_outputs(cluster=2), r"detections_equal 0\.00000"),
        (make_outputs(mask=0.3), "masks_equal 0.5"),
    ],
    ids=["score", "no number", "cluster", "mask"],
)
def test_other_outputs_are_refused_with_the_differences(golden_file: Path, output: RawOutputs, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        check_golden(FixedSession(output), golden_file)


def test_golden_outputs_of_another_network_are_refused(golden_file: Path) -> None:
    with np.load(golden_file) as stored:
        arrays = dict(stored)
    np.savez(golden_file, allow_pickle=False, **{**arrays, "scores": np.zeros((2, 5))})
    with pytest.raises(ParityError, match="another network"):
        check_golden(FixedSession(make_outputs()), golden_file)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_without_golden_outputs_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="does not contain golden outputs"):
        check_golden(FixedSession(make_outputs()), path)


def update_hashes(artifact: Path) -> None:
    """Update the hashes in the contract after a deliberate change."""
    contract = json.loads((artifact / "contract.json").read_text())
    contract["files"] = {name: hash_file(artifact / name) for name in contract["files"]}
    (artifact / "contract.json").write_text(json.dumps(contract))


def test_the_graph_of_another_network_is_refused_even_with_a_valid_hash(artifact: Path) -> None:
    x = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["B", 3, 8, 8])
    node = onnx.helper.make_node("Identity", ["pixels"], ["scores"])
    y = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.UINT8, ["B", 3, 8, 8])
    graph = onnx.helper.make_graph([node], "other", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (artifact / "network.onnx").write_bytes(model.SerializeToString())
    update_hashes(artifact)
    with pytest.raises(ContractMismatch, match=r"the network has \{'pixels'.*its contract says"):
        load_session(artifact)


def test_a_graph_with_other_weights_is_refused(artifact: Path) -> None:
    model = onnx.load(artifact / "network.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("decoder.class_head.weight"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(-4 * onnx.numpy_helper.to_array(tensor), tensor.name))
    (artifact / "network.onnx").write_bytes(model.SerializeToString())
    update_hashes(artifact)
    for backend in ("cpu", "torch"):
        with pytest.raises(ParityError, match=f"golden.npz on {backend}: outputs differ"):
            load_session(artifact, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x07\x12\x04cut"])
def test_a_file_that_is_not_a_graph_is_refused_on_one_line(artifact: Path, content: bytes) -> None:
    (artifact / "network.onnx").write_bytes(content)
    update_hashes(artifact)
    for backend in ("cpu", "torch", *(["openvino"] if find_spec("openvino") else [])):
        with pytest.raises(ArtifactError, match=r"network\.onnx") as refused:
            load_session(artifact, backend=backend)  # type: ignore[arg-type]
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_an_unavailable_backend_is_an_error(tiny_artifact: Path, backend: Backend) -> None:
    if PROVIDER_NAMES[backend] in onnxruntime.get_available_providers():  # type: ignore[index]
        pytest.skip(f"this ONNX Runtime has {backend}")
    with pytest.raises(BackendUnavailable, match=f"backend {backend}: .*install"):
        load_session(tiny_artifact, backend=backend)


def test_auto_takes_the_fastest_backend_that_works_and_says_why_not_the_others(
    tiny_artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    caplog.set_level("INFO")
    _, session = load_session(tiny_artifact, backend="auto", threads=1)
    assert isinstance(session, AutoSession)
    assert session.backend == ("openvino" if find_spec("openvino") else "cpu")
    assert list(session.skipped_backends)[:3] == ["tensorrt", "cuda", "openvino-int8"]
    assert "has no int8 network" in session.skipped_backends["openvino-int8"]
    assert f"skipping backend cuda: {session.skipped_backends['cuda']}" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ParityError("golden.npz on fast: outputs differ"), "golden.npz on fast: outputs differ"),
        (RuntimeError("a fault\nin a library"), "RuntimeError: a fault"),
    ],
    ids=["outputs differ", "a library fails"],
)
def test_auto_falls_back_to_onnx_runtime_and_raises_its_error(error: Exception, reason: str) -> None:
    def load(backend: ConcreteBackend) -> Session:
        if backend != "cpu":
            raise error
        return FixedSession(make_outputs())

    chosen = load_fastest(load)
    assert chosen.backend == "fixed"
    assert dict(chosen.skipped_backends) == dict.fromkeys(("tensorrt", "cuda", "openvino-int8", "openvino"), reason)

    def fail(backend: ConcreteBackend) -> Session:
        raise ContractMismatch(f"no shapes on {backend}")

    with pytest.raises(ContractMismatch, match="no shapes on cpu"):
        load_fastest(fail)


ARTIFACTS = ("tiny_artifact", pytest.param("tiny_cascade_artifact", marks=pytest.mark.slow))
EVERYWHERE = ("cpu", "torch")
"""Backends that every machine must have."""


Opened = tuple[Contract, Session, Session]
"""An artifact loaded on a backend, and on the CPU for comparison."""


@pytest.fixture(scope="module", params=ARTIFACTS)
def exported(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module", params=get_args(ConcreteBackend))
def opened(request: pytest.FixtureRequest, exported: Path) -> Opened:
    backend: Backend = request.param
    try:
        contract, session = load_session(exported, backend=backend, threads=1)
    except BackendUnavailable as error:
        if backend in EVERYWHERE:
            raise
        pytest.skip(str(error))
    if isinstance(session, HotSwapSession):
        session.wait_ready()
    assert session.backend.split(" ")[0] == backend
    return contract, session, load_session(exported, threads=1)[1]


def draw(contract: Contract, count: int) -> list[NetworkInput]:
    """Scenes of the first input size, the last one narrower."""
    scenes = [draw_scene(20 + seed, contract.input_sizes[0]) for seed in range(count)]
    height, width = scenes[-1].size
    return [*scenes[:-1], NetworkInput(pixels=scenes[-1].pixels, size=(height, width - 8))]


def test_outputs_equal_those_of_the_cpu_for_every_input_size(opened: Opened) -> None:
    contract, session, reference = opened
    tolerance = getattr(session, "tolerance", FP32_TOLERANCE)
    for input_size in (*contract.input_sizes, *contract.input_sizes):  # sizes alternate
        scene = stack_images([draw_scene(11, input_size)])
        given = session.run(*scene)
        assert given[0].masks.dtype == given[0].semantic.dtype == given[0].boxes.dtype == np.float32
        require_equal_outputs(reference.run(*scene), given, f"{input_size} on {session.backend}", tolerance)


def test_outputs_of_a_batch_equal_those_of_each_image(opened: Opened) -> None:
    contract, session, _ = opened
    images = draw(contract, 3)
    together = session.run(*stack_images(images))
    alone = [session.run(*stack_images([image]))[0] for image in images]
    assert len(together) == 3
    require_equal_outputs(alone, together, "together and alone", getattr(session, "tolerance", FP32_TOLERANCE))


def test_outputs_are_not_overwritten_by_the_next_run(opened: Opened) -> None:
    contract, session, _ = opened
    scene, other = (stack_images([draw_scene(seed, contract.input_sizes[0])]) for seed in (1, 2))
    output = session.run(*scene)[0]
    kept = {name: value.copy() for name, value in vars(output).items() if value is not None}
    session.run(*other)
    assert all(np.array_equal(getattr(output, name), value) for name, value in kept.items())
