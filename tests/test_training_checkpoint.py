from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD

from model.errors import CheckpointError
from training.checkpoint import load_checkpoint, read_facts, write_checkpoint


def make(value: float) -> tuple[nn.Sequential, SGD, nn.Sequential]:
    """A frozen layer before a trained one, both of one value, its optimiser after a step, and an average."""
    module, average = (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2))
    module[0].requires_grad_(False)
    for each, number in ((module, value), (average, 10 * value)):
        for tensor in each.state_dict().values():
            tensor.fill_(number)
    optimiser = SGD(module[1].parameters(), lr=0.0, momentum=0.9)
    module(torch.ones(1, 1)).sum().backward()
    optimiser.step()
    return module, optimiser, average


def test_what_is_trained_its_momentum_and_its_average_come_back_and_what_is_frozen_stays(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    module, optimiser, average = make(1.0)
    write_checkpoint(path, module, optimiser, {"step": 3}, average)
    assert read_facts(path) == {"step": 3}
    assert not [name for name in load_file(path) if name.startswith(("decoder.0.", "average.0."))]
    other, resumed, other_average = make(2.0)
    load_checkpoint(path, other, resumed, other_average)
    assert [float(each.weight.detach()) for each in (other[0], other[1])] == [2.0, 1.0]
    assert [float(each.weight.detach()) for each in (other_average[0], other_average[1])] == [20.0, 10.0]
    momenta = [float(entry["momentum_buffer"].sum()) for entry in resumed.state_dict()["state"].values()]
    assert momenta == [2.0, 1.0]  # of the weight, whose input was 2, and of the bias


def test_a_checkpoint_without_the_average_that_is_wished_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    module, optimiser, average = make(1.0)
    write_checkpoint(path, module, optimiser, {"step": 3})
    with pytest.raises(CheckpointError, match=r"missing 1\.weight"):
        load_checkpoint(path, module, optimiser, average)
