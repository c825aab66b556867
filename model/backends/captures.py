"""Runs of a network recorded once for each size of a batch and replayed: CUDA graphs."""

import logging
import threading
from collections.abc import Callable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from model.network.raw import Raw

logger = logging.getLogger(__name__)

Forward = Callable[[UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], Raw]
Capture = Callable[[Forward, UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]], Forward]
"""Records a run on inputs of those shapes; what it gives takes no others."""

BATCHES = (1, 2, 4, 8, 16, 32)
_WARM_UPS = 3
"""Runs before a recording, so that libraries have chosen their kernels and hold their memory."""


class CapturedForward:
    """Answers batches of any size from recordings of a few, each made when it is first needed.

    A recording is tied to the size of a batch and to the canvas. A batch is filled up to the next size with pictures
    of zeros, and split if it is larger than the largest. After a recording that failed, for whatever reason, all runs
    are eager, and the log says so once.
    """

    def __init__(self, forward: Forward, capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._recordings: dict[tuple[int, ...], Forward] = {}
        self._is_eager = False
        self._lock = threading.Lock()

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Raw:
        """The answers; they belong to the caller."""
        with self._lock:  # a recording has one place for its inputs
            parts = [
                self._run(each, of_each)
                for each, of_each in zip(pixels.split(BATCHES[-1]), sizes.split(BATCHES[-1]), strict=True)
            ]
        return Raw(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _run(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Raw:
        if self._is_eager:
            return self._forward(pixels, sizes)
        count = pixels.shape[0]
        filled, filled_sizes = fill(pixels, sizes)
        key = tuple(filled.shape)
        if key not in self._recordings:
            try:
                self._recordings[key] = self._capture(self._forward, filled, filled_sizes)
            except RuntimeError as error:  # what torch raises for anything that CUDA refuses
                logger.warning("no CUDA graph for %s, running without: %s", key, str(error).splitlines()[0])
                self._is_eager = True
                self._recordings.clear()
                return self._forward(pixels, sizes)
        return Raw(*(part[:count].clone() for part in self._recordings[key](filled, filled_sizes)))


def choose_batch(count: int) -> int:
    """The least of `BATCHES` that holds as many pictures."""
    return next(batch for batch in BATCHES if batch >= count)


def fill(
    pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]
) -> tuple[UInt8[Tensor, "N 3 H W"], Int[Tensor, "N 2"]]:
    """The batch with pictures of zeros, as large as the canvas, up to one of `BATCHES`."""
    count = pixels.shape[0]
    missing = choose_batch(count) - count
    empty = pixels.new_zeros((missing, *pixels.shape[1:]))
    whole = sizes.new_tensor([pixels.shape[2:]]).expand(missing, -1)
    return torch.cat([pixels, empty]), torch.cat([sizes, whole])


def capture_cuda_graph(forward: Forward, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Forward:
    """A CUDA graph of one run; its answers are overwritten by the next. Raises RuntimeError if CUDA cannot record it.

    As torch's notes on CUDA graphs ask for: inputs that stay in place, and a warm-up on a side stream.
    """
    kept, kept_sizes = pixels.clone(), sizes.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            forward(kept, kept_sizes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = forward(kept, kept_sizes)

    def replay(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Raw:
        kept.copy_(pixels)
        kept_sizes.copy_(sizes)
        graph.replay()
        return answers

    return replay
