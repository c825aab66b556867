"""Data-parallel training in several processes started by `torchrun`; each computes its slice of every batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among all; with a single process every method returns its input."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """True in the process that writes files and logs."""
        return self.rank == 0

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ConfigError if the batch cannot be divided evenly."""
        if batch_size % self.world_size:
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided among {self.world_size} processes: choose --batch-size"
            )

    def local_slice(self, first: int, batch_size: int) -> tuple[int, int]:
        """Return first sample and number of samples of this process, in a batch that starts at `first`."""
        count = batch_size // self.world_size
        return first + self.rank * count, count

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their mean over all processes; a parameter without a gradient anywhere keeps None.

        All gradients are sent as one message. DistributedDataParallel would overlap communication with the backward
        pass, but the decoder has only 4 M weights, and checkpoints and EMA need not handle a wrapped module.
        """
        if self.world_size == 1:
            return
        flat = torch.cat([_flat_gradient(each) for each in parameters] + [_has_gradient(parameters)])
        distributed.all_reduce(flat)
        parts = flat.split([each.numel() for each in parameters] + [len(parameters)])
        for parameter, total, count in zip(parameters, parts[:-1], parts[-1], strict=True):
            parameter.grad = (total / self.world_size).view_as(parameter) if count else None

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over the processes, which must all pass the same keys."""
        if self.world_size == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        return dict(zip(values, mean_over_processes(tensor).tolist(), strict=True))

    def all_reduce_any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""
        return self.all_reduce_mean({"flag": float(flag)})["flag"] > 0.0


SINGLE_PROCESS = DistributedContext()


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group of `torchrun` for the duration of the block; without `torchrun`, a single process."""
    if not distributed.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield DistributedContext(rank=distributed.get_rank(), world_size=distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; the tensor itself without a process group.

    Applied to a loss's denominator, it makes the mean of the gradients equal to the gradient of the whole batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    return mean / distributed.get_world_size()


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()


def _has_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    flags = [float(each.grad is not None) for each in parameters]
    return torch.tensor(flags, dtype=parameters[0].dtype, device=parameters[0].device)
