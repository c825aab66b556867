"""Batches of any size come from recordings of a few; where nothing can be recorded, they come all the same."""

import logging

import pytest
import torch
from torch import Tensor

from model.backends.captures import BATCHES, CapturedForward, Forward, capture_cuda_graph, choose_batch, fill
from model.network.raw import Raw

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")


def answer(pixels: Tensor, sizes: Tensor) -> Raw:
    """The mean of each picture as its score, its size as its box."""
    count = len(pixels)
    return Raw(
        scores=pixels.float().mean((1, 2, 3))[:, None],
        clusters=torch.zeros(count, 1, dtype=torch.int64, device=pixels.device),
        boxes=torch.cat([sizes, sizes], dim=1)[:, None].float(),
        masks=torch.zeros(count, 1, 2, 2, device=pixels.device),
        semantic=torch.zeros(count, 1, 2, 2, device=pixels.device),
    )


class Recorder:
    """Records as CUDA does: the answers of one recording lie in one place."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, forward: Forward, pixels: Tensor, sizes: Tensor) -> Forward:
        self.shapes.append(tuple(pixels.shape))
        place = forward(pixels, sizes)

        def replay(pixels: Tensor, sizes: Tensor) -> Raw:
            assert tuple(pixels.shape) == tuple(place.scores.shape[:1]) + tuple(pixels.shape[1:])
            for kept, new in zip(place, forward(pixels, sizes), strict=True):
                kept.copy_(new)
            return place

        return replay


def draw(count: int, height: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    """Picture i is all i + 1, of size (1, i + 1)."""
    values = torch.arange(1, count + 1)
    pixels = values.to(torch.uint8)[:, None, None, None].expand(-1, 3, height, width)
    return pixels, torch.stack([torch.ones(count, dtype=torch.int64), values], dim=1)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (32, 32)])
def test_a_batch_is_filled_up_to_the_next_size(count: int, batch: int) -> None:
    assert choose_batch(count) == batch
    pixels, sizes = fill(*draw(count))
    assert (pixels.shape[0], sizes.shape[0]) == (batch, batch)
    assert pixels[count:].sum() == 0
    assert sizes[count:].tolist() == [[4, 6]] * (batch - count)


@pytest.mark.parametrize("count", [1, 3, 32, 33, 70])
def test_every_picture_gets_its_own_answer(count: int) -> None:
    outputs = CapturedForward(answer, Recorder())(*draw(count))
    assert outputs.scores[:, 0].tolist() == list(range(1, count + 1))
    assert outputs.boxes[:, 0, 1].tolist() == list(range(1, count + 1))


def test_a_recording_is_made_once_for_each_size_of_batch_and_canvas() -> None:
    recorder = Recorder()
    run = CapturedForward(answer, recorder)
    for count, width in [(3, 6), (4, 6), (1, 6), (3, 8), (4, 8), (3, 6)]:
        run(*draw(count, width=width))
    assert recorder.shapes == [(4, 3, 4, 6), (1, 3, 4, 6), (4, 3, 4, 8)]


def test_answers_are_not_overwritten_by_the_next_run() -> None:
    run = CapturedForward(answer, Recorder())
    first = run(*draw(1))
    run(torch.full((1, 3, 4, 6), 9, dtype=torch.uint8), torch.tensor([[4, 6]]))
    assert first.scores.tolist() == [[1.0]]


def test_where_nothing_can_be_recorded_runs_are_eager_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def refuse(_forward: Forward, pixels: Tensor, _sizes: Tensor) -> Forward:
        asked.append(len(pixels))
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run = CapturedForward(answer, refuse)
    with caplog.at_level(logging.WARNING):
        assert run(*draw(3)).scores[:, 0].tolist() == [1.0, 2.0, 3.0]
        assert run(*draw(2)).scores[:, 0].tolist() == [1.0, 2.0]
    assert asked == [4]
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for (4, 3, 4, 6), running without: operation not permitted when stream is capturing"
    ]


@needs_cuda
@pytest.mark.parametrize("count", [1, 3, max(BATCHES) + 1])
def test_a_cuda_graph_answers_as_an_eager_run_does(count: int) -> None:
    pixels, sizes = (each.cuda() for each in draw(count))
    outputs = CapturedForward(answer, capture_cuda_graph)(pixels, sizes)
    assert outputs.scores[:, 0].tolist() == list(range(1, count + 1))
