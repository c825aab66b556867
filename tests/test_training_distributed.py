"""Processes that share every batch fit as one with the whole batch would, and go on after one of them was killed."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from model.errors import ConfigError
from training.data.dataset import PseudoLabelDataset
from training.presets import make_train_config
from training.train import train
from training.trainer.distributed import SINGLE_PROCESS, DistributedContext, average, init_distributed

LIMIT_S = 240
STEPS = 12


def test_a_batch_is_shared_out_in_order_and_evenly() -> None:
    assert [DistributedContext(number=number, count=2).share(12, 6) for number in (0, 1)] == [(12, 3), (15, 3)]
    assert SINGLE_PROCESS.share(12, 6) == (12, 6)
    with pytest.raises(ConfigError, match="a batch of 5 cannot be shared by 2 processes"):
        DistributedContext(count=2).require_shares(5)


def test_one_process_alone_is_left_as_it_is() -> None:
    with init_distributed("cpu") as ranks:
        assert ranks == SINGLE_PROCESS
        assert (ranks.is_first, ranks.agree(False), ranks.agree(True)) == (True, False, True)
        assert ranks.average({"loss": 2.0}) == {"loss": 2.0}
    value = torch.tensor(3.0)
    assert average(value) is value


def plan_command(store: PseudoLabelDataset, run: Path) -> list[str]:
    """Two processes under torchrun, two samples of each batch of four for either."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--preset", "tiny", "--batch", "4", "--steps", str(STEPS), "--checkpoint-every", "2"]
    return [*launcher, "-m", "training", "--threads", "1", "train", str(store.folder), "--out", str(run), *options]


def read_losses(run: Path) -> list[list[float]]:
    with (run / "history.csv").open() as stream:
        return [[float(text) for text in row] for row in list(csv.reader(stream))[1:]]


@pytest.mark.slow
def test_two_processes_fit_as_one_and_go_on_after_one_was_killed(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    recipe = make_train_config("mask_transformer", "tiny", {"batch": 4, "steps": STEPS, "checkpoint_every": 2})
    train(tiny_store, tiny_store.features, tmp_path / "one", recipe)
    command, run = plan_command(tiny_store, tmp_path / "two"), tmp_path / "two"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (run / "history.csv").exists() or len(read_losses(run)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(psutil.Process(process.pid).children()[1].pid, signal.SIGKILL)
        assert process.wait(LIMIT_S) != 0
    assert 3 <= len(read_losses(run)) < STEPS
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert ended.stdout.count('"step": 12') == 1  # one of them tells
    # Sums over two processes are rounded in another order; AdamW's division by small moments makes more of it.
    assert torch.tensor(read_losses(run)).sub(torch.tensor(read_losses(tmp_path / "one"))).abs().max() < 1e-3
