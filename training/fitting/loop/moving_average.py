"""Weights averaged over the steps of a fit."""

import torch
from torch import nn


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move the average towards a module of the same sizes, at its step counted from 0.

    The decay rises towards the given one, (1 + n) / (10 + n) at step n, or a short fit would keep much of the weights
    it began with. Statistics of norms are averaged as weights are; whole numbers are taken over.
    """
    share = 1.0 - min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, share)
        else:
            mean.copy_(value)
