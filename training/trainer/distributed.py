"""The processes that fit one run together under `torchrun`, each on its share of every batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among all; where there is but one, nothing here costs or changes anything."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and tells."""
        return self.number == 0

    def share(self, first: int, size: int) -> tuple[int, int]:
        """First sample and number of samples of this process, in a batch that begins at `first`."""
        own = size // self.count
        return first + self.number * own, own

    def require_shares(self, size: int) -> None:
        """Raise ConfigError for a batch that cannot be shared out evenly."""
        if size % self.count:
            raise ConfigError(f"a batch of {size} cannot be shared by {self.count} processes: choose another --batch")

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean gradients; one that no process has stays away.

        One message of all numbers, where DistributedDataParallel would send parts while others are still computed: the
        decoder's 4 M weights are soon sent, and the trainer, its checkpoints and averages need not know of a wrapper.
        """
        if self.count == 1:
            return
        flat = torch.cat([_flatten(each) for each in parameters] + [_list_present(parameters)])
        distributed.all_reduce(flat)
        parts = flat.split([each.numel() for each in parameters] + [len(parameters)])
        for parameter, mean, present in zip(parameters, parts[:-1], parts[-1], strict=True):
            parameter.grad = (mean / self.count).view_as(parameter) if present else None

    def average(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The mean of each figure over the processes, which all have the same."""
        if self.count == 1:
            return dict(figures)
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        return dict(zip(figures, average(values).tolist(), strict=True))

    def agree(self, is_wished: bool) -> bool:
        """Whether any process wishes it."""
        return self.average({"wished": float(is_wished)})["wished"] > 0.0


SINGLE_PROCESS = DistributedContext()


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """The group that `torchrun` began, or this process alone; left when the block ends."""
    if not distributed.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield DistributedContext(number=distributed.get_rank(), count=distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def average(value: Tensor) -> Tensor:
    """The mean over the processes that fit together; itself where there is one.

    Of a loss's denominator: with it, the mean of the processes' gradients is that of the whole batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    return mean / distributed.get_world_size()


def _flatten(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()


def _list_present(parameters: Sequence[nn.Parameter]) -> Tensor:
    here = [float(each.grad is not None) for each in parameters]
    return torch.tensor(here, dtype=parameters[0].dtype, device=parameters[0].device)
