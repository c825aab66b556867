import pytest
import torch
from torch import nn

from training.fitting.loop.moving_average import follow


def fill(value: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1)
    for tensor in norm.state_dict().values():
        tensor.fill_(value)
    return norm


def test_the_average_follows_quickly_at_first_and_then_by_the_decay() -> None:
    average = fill(0.0)
    follow(average, fill(10.0), 0.5, 0)
    assert float(average.weight.detach()) == pytest.approx(9.0)  # a tenth of the start is left
    follow(average, fill(20.0), 0.5, 1000)
    assert float(average.weight.detach()) == pytest.approx(14.5)
    assert float(average.running_mean) == pytest.approx(14.5)
    assert int(average.num_batches_tracked) == 20


def test_the_average_takes_no_gradient() -> None:
    average, module = nn.Linear(1, 1), nn.Linear(1, 1)
    follow(average, module, 0.9, 5)
    assert average.weight.grad_fn is None
    assert not torch.equal(average.weight, module.weight)
