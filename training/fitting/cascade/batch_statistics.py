"""Statistics of batch norms that belong to the weights as they are."""

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def measure_statistics(module: nn.Module, forward: Callable[[int], object], batches: int) -> None:
    """Let each batch norm's running statistics be the mean of those of so many batches.

    PreciseBN ("Rethinking 'Batch' in BatchNorm", section 3.2), with the mean of the variances. `forward` runs the
    module on the batch of a number; without a batch norm it is not called.
    """
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d) and each.training]
    if not norms:
        return
    momenta = [each.momentum for each in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the mean of all batches since the reset
    for number in range(batches):
        forward(number)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
