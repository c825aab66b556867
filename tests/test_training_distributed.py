"""Training in several processes gives the results of one, and continues after a process was killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from model.errors import ConfigError
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.train import train
from training.trainer.distributed import SINGLE_PROCESS, DistributedContext, init_distributed, mean_over_processes
from training.trainer.loggers import LOSSES_FILE, read_csv_log

TIMEOUT_S = 240
STEPS = 12


def test_a_batch_is_divided_in_order_and_evenly() -> None:
    contexts = [DistributedContext(rank=rank, world_size=2) for rank in (0, 1)]
    assert [each.local_slice(12, 6) for each in contexts] == [(12, 3), (15, 3)]
    assert SINGLE_PROCESS.local_slice(12, 6) == (12, 6)
    with pytest.raises(ConfigError, match="a batch of 5 cannot be divided among 2 processes"):
        contexts[0].check_batch_size(5)


def test_a_single_process_changes_nothing() -> None:
    with init_distributed("cpu") as context:
        assert context == SINGLE_PROCESS
        assert context.is_main_process
        assert [context.all_reduce_any(flag) for flag in (False, True)] == [False, True]
        assert context.all_reduce_mean({"loss": 2.0}) == {"loss": 2.0}
    value = torch.tensor(3.0)
    assert mean_over_processes(value) is value


def make_command(labels: Path, run: Path) -> list[str]:
    """Two processes under torchrun, with two samples of each batch of four."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--preset", "tiny", "--batch-size", "4", "--max-steps", str(STEPS), "--checkpoint-interval", "2"]
    return [*launcher, "-m", "model", "train", str(labels), "--out", str(run), "--threads", "1", *options]


def read_losses(run: Path) -> torch.Tensor:
    return torch.tensor(list(read_csv_log(run / LOSSES_FILE).values()))


@pytest.mark.slow
def test_two_processes_train_as_one_and_continue_after_one_was_killed(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    config = replace(MASK_TRANSFORMER_PRESETS["tiny"], batch_size=4, max_steps=STEPS, checkpoint_interval=2)
    train(tiny_store, tiny_store.features, tmp_path / "one", config)
    command, run = make_command(tiny_store.folder, tmp_path / "two"), tmp_path / "two"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (run / LOSSES_FILE).exists() or read_losses(run).shape[1] < 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(psutil.Process(process.pid).children()[1].pid, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) != 0
    assert 3 <= read_losses(run).shape[1] < STEPS
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert ended.stdout.count('"step": 12') == 1  # only the main process prints
    # Sums over two processes are rounded in another order; AdamW's division by small moments amplifies it.
    assert (read_losses(run) - read_losses(tmp_path / "one")).abs().max() < 1e-3
