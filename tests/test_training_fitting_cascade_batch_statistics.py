import pytest
import torch
from torch import nn

from training.fitting.cascade.batch_statistics import measure_statistics


def test_running_statistics_become_the_mean_over_the_batches() -> None:
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(99.0)
    batches = [torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), torch.tensor([10.0, 14.0]).reshape(2, 1, 1, 1)]
    measure_statistics(norm, lambda number: norm(batches[number]), 2)
    assert float(norm.running_mean) == pytest.approx((1.0 + 12.0) / 2)
    assert float(norm.running_var) == pytest.approx((2.0 + 8.0) / 2)  # torch's are unbiased
    assert norm.momentum == 0.1


def test_without_a_batch_norm_no_batch_is_asked_for() -> None:
    def refuse(number: int) -> None:
        raise AssertionError(number)

    measure_statistics(nn.Sequential(nn.GroupNorm(1, 1), nn.LayerNorm(3)), refuse, 5)
