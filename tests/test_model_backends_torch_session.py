"""Torch answers as the artifact promises, in any precision within what that precision allows."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from model.backends.parity import FP32, compare, decide
from model.backends.torch_session import TorchPrecision, TorchSession, open_torch_session
from model.contract import Canvas, read_contract
from model.release.export import draw_scene
from model.release.gate import stack

SCENES = stack([draw_scene(seed, Canvas.square(tiny.SIDE_PX)) for seed in range(3)])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def open_tiny(artifact: Path, device: str, precision: TorchPrecision) -> TorchSession:
    return open_torch_session(read_contract(artifact), artifact, torch.device(device), precision)


def test_on_a_cpu_it_is_eager_and_in_fp32(tiny_artifact: Path) -> None:
    session = open_torch_session(read_contract(tiny_artifact), tiny_artifact, torch.device("cpu"))
    assert (session.backend, session.tolerance) == ("torch", FP32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_answers_in_fp32_and_within_its_tolerance(
    tiny_artifact: Path, precision: TorchPrecision
) -> None:
    exact, session = (open_tiny(tiny_artifact, "cpu", each) for each in ("fp32", precision))
    expected, given = exact.run(*SCENES), session.run(*SCENES)
    assert {value.dtype for answer in given for value in vars(answer).values()} == {
        np.dtype(np.float32),
        np.dtype(np.int64),
    }
    assert not np.array_equal(expected[0].semantic, given[0].semantic)
    compare(decide(expected), decide(given), session.tolerance).require(precision, session.tolerance)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_replays_graphs_and_answers_as_the_cpu_does(
    tiny_artifact: Path, precision: TorchPrecision, caplog: pytest.LogCaptureFixture
) -> None:
    expected = open_tiny(tiny_artifact, "cpu", "fp32").run(*SCENES)
    session = open_tiny(tiny_artifact, "cuda", precision)
    given = session.run(*SCENES)
    assert session.backend == f"torch on cuda, {precision}"
    assert "no CUDA graph" not in caplog.text
    compare(decide(expected), decide(given), session.tolerance).require(precision, session.tolerance)
