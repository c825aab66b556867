"""Data-parallel training in several processes started by `torchrun`; each computes its slice of every batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from model.errors import ConfigError


@contextmanager
def init_distributed(device: str) -> Iterator[None]:
    """Join the process group of `torchrun` for the duration of the block; without `torchrun`, there is none."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def get_rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process and that of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_main_process() -> bool:
    """Return True in the process that writes files and logs."""
    return get_rank_and_world_size()[0] == 0


def slice_batch(first: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return first sample and number of samples of a process, in a batch that starts at `first`.

    Raises ConfigError if the batch cannot be divided evenly.
    """
    count, rest = divmod(batch_size, world_size)
    if rest:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided among {world_size} processes: choose --batch-size"
        )
    return first + rank * count, count


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes; a parameter without a gradient anywhere keeps None.

    All gradients are sent as one message. DistributedDataParallel would overlap communication with the backward
    pass, but the decoder has only 4 M weights, and checkpoints and EMA need not handle a wrapped module.
    """
    world_size = get_rank_and_world_size()[1]
    if world_size == 1:
        return
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    has_gradient = gradients[0].new_tensor([each.grad is not None for each in parameters])
    flat = torch.cat([each.flatten() for each in (*gradients, has_gradient)])
    distributed.all_reduce(flat)
    *sums, counts = flat.split([each.numel() for each in (*gradients, has_gradient)])
    for parameter, total, count in zip(parameters, sums, counts, strict=True):
        parameter.grad = (total / world_size).view_as(parameter) if count else None


def all_reduce_mean(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each value over the processes, which must all pass the same keys."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    return dict(zip(values, mean_over_processes(tensor).tolist(), strict=True))


def all_reduce_any(flag: bool) -> bool:
    """Return True if the flag is set in any process."""
    return bool(mean_over_processes(torch.tensor(float(flag))) > 0.0)


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; the tensor itself without a process group.

    Applied to a loss's denominator, it makes the mean of the gradients equal to the gradient of the whole batch.
    """
    world_size = get_rank_and_world_size()[1]
    if world_size == 1:
        return value
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    return mean / world_size
