"""torch sessions compute the golden outputs, eagerly or by CUDA graphs, in any precision."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from torch import Tensor

from model.backends.parity import require_equal_outputs
from model.backends.torch_session import (
    GRAPH_BATCH_SIZES,
    CudaGraphRunner,
    Forward,
    TorchPrecision,
    TorchSession,
    capture_cuda_graph,
    load_torch_network,
)
from model.contract import Contract, InputSize, RawOutputs, read_contract
from model.errors import ArtifactError
from model.export.export import draw_scene
from model.export.parity_checks import stack_images
from model.networks.interface import NetworkOutput

SCENES = stack_images([draw_scene(seed, InputSize.square(tiny.SIDE_PX)) for seed in range(3)])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def load_tiny(artifact: Path, device: str, precision: TorchPrecision) -> TorchSession:
    network = load_torch_network(read_contract(artifact), artifact)
    return TorchSession(network, device=torch.device(device), precision=precision)


def check_outputs(session: TorchSession, expected: list[RawOutputs]) -> None:
    given, tolerance = session.run(*SCENES), session.tolerance
    assert {value.dtype for output in given for value in vars(output).values() if value is not None} == {
        np.dtype(np.float32),
        np.dtype(np.int64),
    }
    assert not np.array_equal(expected[0].semantic, given[0].semantic)
    require_equal_outputs(expected, given, session.backend, tolerance)


def test_half_precision_outputs_are_fp32_and_within_the_tolerance(tiny_artifact: Path) -> None:
    check_outputs(load_tiny(tiny_artifact, "cpu", "fp16"), load_tiny(tiny_artifact, "cpu", "fp32").run(*SCENES))


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_replays_graphs_with_the_outputs_of_the_cpu(
    tiny_artifact: Path, precision: TorchPrecision, caplog: pytest.LogCaptureFixture
) -> None:
    session = load_tiny(tiny_artifact, "cuda", precision)
    assert session.backend == f"torch on cuda, {precision}"
    check_outputs(session, load_tiny(tiny_artifact, "cpu", "fp32").run(*SCENES))
    assert "cannot capture" not in caplog.text


def predict(pixels: Tensor, sizes: Tensor) -> NetworkOutput:
    """Return the mean of each image as its score, its size as its box."""
    count = len(pixels)
    return NetworkOutput(
        scores=pixels.float().mean((1, 2, 3))[:, None],
        clusters=torch.zeros(count, 1, dtype=torch.int64, device=pixels.device),
        boxes=torch.cat([sizes, sizes], dim=1)[:, None].float(),
        masks=torch.zeros(count, 1, 2, 2, device=pixels.device),
        semantic=torch.zeros(count, 1, 2, 2, device=pixels.device),
    )


class Recorder:
    """Captures as CUDA does: all replays share one output buffer."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, forward: Forward, pixels: Tensor, sizes: Tensor) -> Forward:
        self.shapes.append(tuple(pixels.shape))
        place = forward(pixels, sizes)

        def replay(pixels: Tensor, sizes: Tensor) -> NetworkOutput:
            assert tuple(pixels.shape) == tuple(place.scores.shape[:1]) + tuple(pixels.shape[1:])
            for name, new in forward(pixels, sizes).parts.items():
                place.parts[name].copy_(new)
            return place

        return replay


def draw(count: int, height: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    """Image i has all values i + 1 and size (1, i + 1)."""
    values = torch.arange(1, count + 1)
    pixels = values.to(torch.uint8)[:, None, None, None].expand(-1, 3, height, width)
    return pixels, torch.stack([torch.ones(count, dtype=torch.int64), values], dim=1)


def test_a_graph_is_captured_once_per_batch_and_input_size() -> None:
    recorder = Recorder()
    run = CudaGraphRunner(predict, recorder)
    for count, width in [(3, 6), (4, 6), (1, 6), (3, 8), (4, 8), (3, 6)]:
        run(*draw(count, width=width))
    assert recorder.shapes == [(4, 3, 4, 6), (1, 3, 4, 6), (4, 3, 4, 8)]


def test_if_a_capture_fails_runs_are_eager_and_this_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def refuse(_forward: Forward, pixels: Tensor, _sizes: Tensor) -> Forward:
        asked.append(len(pixels))
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run = CudaGraphRunner(predict, refuse)
    with caplog.at_level(logging.WARNING):
        assert run(*draw(3)).scores[:, 0].tolist() == [1.0, 2.0, 3.0]
        assert run(*draw(2)).scores[:, 0].tolist() == [1.0, 2.0]
    assert asked == [4]
    assert [record.message for record in caplog.records] == [
        "cannot capture a CUDA graph for (4, 3, 4, 6), running eagerly: "
        "operation not permitted when stream is capturing"
    ]


@needs_cuda
@pytest.mark.parametrize("count", [1, 3, max(GRAPH_BATCH_SIZES) + 1])
def test_a_cuda_graph_computes_as_an_eager_run(count: int) -> None:
    pixels, sizes = (each.cuda() for each in draw(count))
    outputs = CudaGraphRunner(predict, capture_cuda_graph)(pixels, sizes)
    assert outputs.scores[:, 0].tolist() == list(range(1, count + 1))


@pytest.fixture
def contract(tiny_artifact: Path) -> Contract:
    return read_contract(tiny_artifact)


def drop(artifact: Path, start: str) -> None:
    """Rename the weight with that prefix in the graph."""
    path = artifact / "network.onnx"
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name.startswith(start))
    tensor.name = "decoder.stranger"
    path.write_bytes(model.SerializeToString())


def test_a_missing_and_an_unexpected_weight_are_named(artifact: Path, contract: Contract) -> None:
    drop(artifact, "decoder.mask_head.0.weight")
    with pytest.raises(ArtifactError, match=r"network\.onnx.*Missing.*decoder\.mask_head\.0\.weight.*export the run"):
        load_torch_network(contract, artifact)
    with pytest.raises(ArtifactError, match=r"Unexpected.*decoder\.stranger"):
        load_torch_network(contract, artifact)


def test_a_misshapen_weight_is_named_with_both_shapes(artifact: Path, contract: Contract) -> None:
    config = {**contract.network_config, "decoder": {**contract.network_config["decoder"], "num_queries": 7}}
    with pytest.raises(ArtifactError, match=r"decoder\.queries: .*\[1, \d+, \d+\].*\[1, 7, \d+\]"):
        load_torch_network(dataclasses.replace(contract, network_config=config), artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_config": {}}, "encoder"),
        ({"network": "hydra"}, "unknown network 'hydra'"),
        ({"network": "panoptic_cascade"}, "cascade"),
    ],
    ids=["no config", "unknown network", "another network"],
)
def test_an_invalid_network_config_is_refused(
    artifact: Path, contract: Contract, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_torch_network(dataclasses.replace(contract, **changes), artifact)  # type: ignore[arg-type]
