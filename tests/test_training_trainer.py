"""The training loop: resuming, checkpoints, provenance, initial weights, moving average and gradient clipping."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from run_logs import read_csv_log
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD

from model.checkpoints.runs import load_run
from model.contract import read_contract
from model.errors import CheckpointError, ConfigError, TrainingError
from model.networks.mask_transformer import MaskDecoder
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.mask_transformer.feature_dataset import FeatureBatch
from training.mask_transformer.task import MaskTransformerTask
from training.train import train
from training.trainer.checkpoint import (
    load_checkpoint,
    load_initial_weights,
    read_checkpoint_metadata,
    write_checkpoint,
)
from training.trainer.config import RunOptions
from training.trainer.distributed import slice_batch
from training.trainer.loggers import LOSSES_FILE, PrometheusTextfileLogger, RunLogger
from training.trainer.task import git_commit
from training.trainer.trainer import Trainer, clip_gradients, make_ema

TINY = MASK_TRANSFORMER_PRESETS["tiny"]
WITH_EMA = replace(TINY, ema_decay=0.9)


def make_trainer(
    dataset: PseudoLabelDataset, run: Path, config: MaskTransformerTrainConfig = TINY
) -> Trainer[FeatureBatch]:
    return Trainer(MaskTransformerTask(dataset, dataset.features, run, config), RunOptions(out=run))


@pytest.mark.parametrize("config", [TINY, WITH_EMA], ids=["weights", "ema"])
def test_a_run_killed_between_checkpoints_resumes_with_identical_results(
    config: MaskTransformerTrainConfig, tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    train(tiny_store, RunOptions(out=uninterrupted), config)
    killed = make_trainer(tiny_store, run, config)
    batches = killed.batches()
    for _ in range(2):
        killed.train_step(next(batches))
    killed.save()
    killed.train_step(next(batches))  # a step after the checkpoint
    batches.close()
    shutil.copyfile(uninterrupted / "losses.csv", run / "losses.csv")  # with rows of lost steps
    assert train(tiny_store, RunOptions(out=run), config).step == 4
    assert read_csv_log(run / LOSSES_FILE) == read_csv_log(uninterrupted / LOSSES_FILE)
    expected, resumed = load_run(uninterrupted)[1].state_dict(), load_run(run)[1].state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_run_cannot_be_resumed_with_other_options_or_labels(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path
) -> None:
    with pytest.raises(ConfigError, match="started with other learning_rate"):
        make_trainer(tiny_store, tiny_run, replace(TINY, learning_rate=1.0))
    other = PseudoLabelDataset(Path(shutil.copytree(tiny_store.folder, tmp_path / "labels")))
    content = json.loads((other.folder / "label.json").read_text())
    (other.folder / "label.json").write_text(json.dumps({**content, "maskcut_tau": 0.5}))
    with pytest.raises(ConfigError, match="started with other labels"):
        make_trainer(other, tiny_run)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_photos(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    run, textfile = tmp_path / "run", tmp_path / "train.prom"
    task = MaskTransformerTask(tiny_store, tiny_store.features, run, TINY)
    trainer = Trainer(task, RunOptions(out=run, prometheus_textfile=textfile))
    batch = next(trainer.batches())
    batch.features[:] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 0; photos of the batch: \d\.png, \d\.png"):
        trainer.train_step(batch)
    assert f'useg_train_not_finite{{run="{run}"}} 1.0\n' in textfile.read_text()


# Exponential moving average


def fill(norm: nn.BatchNorm2d, value: float) -> nn.BatchNorm2d:
    for tensor in norm.state_dict().values():
        tensor.fill_(value)
    return norm


def test_the_moving_average_adapts_fast_at_first_and_then_by_the_decay() -> None:
    norm = fill(nn.BatchNorm2d(1), 0.0)
    ema = make_ema(norm, 0.5)
    ema.update_parameters(fill(norm, 10.0))
    assert float(ema.module.weight.detach()) == 10.0  # the first update copies
    ema.update_parameters(fill(norm, 21.0))
    assert float(ema.module.weight.detach()) == pytest.approx(10.0 + 11.0 * (1 - 2 / 11))
    ema.n_averaged.fill_(1000)
    before = float(ema.module.running_mean)
    ema.update_parameters(fill(norm, 40.0))
    assert float(ema.module.running_mean) == pytest.approx((before + 40.0) / 2)
    assert int(ema.module.num_batches_tracked) == 40
    assert ema.module.weight.grad_fn is None


# Checkpoints


def make_checkpoint_parts(value: float) -> tuple[nn.Sequential, SGD, nn.Module]:
    """A frozen layer before a trained one, both of one value, their optimizer after a step, and an average of 10."""
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[0].requires_grad_(False)
    for tensor in module.state_dict().values():
        tensor.fill_(10 * value)
    ema = make_ema(module, 0.9)
    for tensor in module.state_dict().values():
        tensor.fill_(value)
    optimizer = SGD(module[1].parameters(), lr=0.0, momentum=0.9)
    module(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    return module, optimizer, ema


def test_a_checkpoint_restores_weights_momentum_and_average_without_frozen_parameters(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    module, optimizer, ema = make_checkpoint_parts(1.0)
    ema.n_averaged.fill_(7)
    write_checkpoint(path, module, optimizer, {"step": 3}, ema)
    assert read_checkpoint_metadata(path) == {"step": 3}
    assert not [name for name in load_file(path) if name.startswith(("model.0.", "ema.module.0."))]
    other, resumed, other_ema = make_checkpoint_parts(2.0)
    load_checkpoint(path, other, resumed, other_ema)
    assert [float(each.weight.detach()) for each in (other[0], other[1])] == [2.0, 1.0]
    assert [float(other_ema.module[index].weight.detach()) for index in (0, 1)] == [20.0, 10.0]
    assert int(other_ema.n_averaged) == 7
    momenta = [float(entry["momentum_buffer"].sum()) for entry in resumed.state_dict()["state"].values()]
    assert momenta == [2.0, 1.0]  # of the weight, whose input was 2, and of the bias


@pytest.mark.parametrize("metadata", [{"facts": '{"step": 3}'}, {"metadata": '{"format_version": 1, "step": 3}'}])
def test_a_checkpoint_of_another_format_version_is_rejected(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "checkpoint.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="delete it to restart"):
        read_checkpoint_metadata(tmp_path / "checkpoint.safetensors")


# Initial weights


def test_initial_weights_from_an_artifact_are_those_of_its_run_but_for_rounding(
    tiny_run: Path, tiny_artifact: Path
) -> None:
    info, network = load_run(tiny_run)
    decoders = [MaskDecoder(network.decoder.config, network.encoder.config) for _ in range(2)]
    first = load_initial_weights(decoders[0], "mask_transformer", tiny_run)
    second = load_initial_weights(decoders[1], "mask_transformer", tiny_artifact)
    assert first["reinitialized"] == []
    assert {name.split(".")[0] for name in second["reinitialized"]} == {"patch_mask"}  # used in training only
    assert second["steps"] == first["steps"] == info.step
    assert second["sha256"] == read_contract(tiny_artifact).files["network.onnx"]
    states = [decoder.state_dict() for decoder in decoders]
    for name in set(states[0]) - set(second["reinitialized"]):
        # stored as fp16: eleven bits
        torch.testing.assert_close(states[1][name], states[0][name], rtol=2**-11, atol=2**-24)


# Gradient clipping and devices


def test_gradients_are_clipped_together_or_per_parameter() -> None:
    for per_parameter, second, norm, expected in (
        (False, [0.0, 4.0], 5.0, [[0.6, 0.0], [0.0, 0.8]]),
        (True, [0.0, 0.5], 3.0, [[1.0, 0.0], [0.0, 0.5]]),
    ):
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        for parameter, gradient in zip(parameters, ([3.0, 0.0], second), strict=True):
            parameter.grad = torch.tensor(gradient)
        assert clip_gradients(parameters, 1.0, per_parameter=per_parameter) == pytest.approx(norm)
        for parameter, clipped in zip(parameters, expected, strict=True):
            assert parameter.grad == pytest.approx(torch.tensor(clipped), abs=1e-5)


def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("1")
    assert git_commit(tracked) is None
    settings = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init"], ["add", "tracked.py"], ["commit", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *settings, *arguments], capture_output=True, check=True)
    untracked.write_text("installed inside an unrelated checkout")
    commit = git_commit(tracked)
    assert commit is not None
    assert (len(commit), git_commit(untracked)) == (40, None)
    tracked.write_text("2")
    assert git_commit(tracked) == f"{commit}-dirty"


def test_tensorboard_shows_each_step_once_after_a_resumed_run(tmp_path: Path) -> None:
    first, folder = RunLogger(tmp_path, 0, 4), tmp_path / "tensorboard"
    for step in (1, 2, 3):
        first.log(step, {"total": float(step)}, 0.0, is_last=False)
    first.close()
    (events_file,) = folder.iterdir()  # its name has the second and a counter, of which "9" sorts after "10"
    events_file.rename(folder / "events.out.tfevents.1000000000.first")
    resumed = RunLogger(tmp_path, 2, 4)
    for step in (3, 4):
        resumed.log(step, {"total": 10.0 * step}, 0.0, is_last=False)
    resumed.close()
    assert read_csv_log(tmp_path / LOSSES_FILE) == {"step": [1.0, 2.0, 3.0, 4.0], "total": [1.0, 2.0, 30.0, 40.0]}
    events = EventAccumulator(str(folder)).Reload().Scalars("loss/total")
    assert [(each.step, each.value) for each in events] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def read_textfile(path: Path) -> dict[str, float]:
    """The values of the file by metric, those of the losses by term, without the time; all have the same run."""
    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"RUN"}
    values = {sample.labels.get("term", sample.name): sample.value for sample in samples}
    assert 0.0 <= time.time() - values.pop("useg_train_updated_timestamp_seconds") < 60.0
    return values


def test_the_textfile_has_progress_and_losses_at_intervals_and_the_last_ones_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "useg.prom"
    log = PrometheusTextfileLogger(path, Path("RUN"), 300)
    log.log(30, {"total": 7.5, "mask": 2.5}, 540.0, is_last=False)
    assert read_textfile(path) == {
        "useg_train_step": 30.0,
        "useg_train_max_steps": 300.0,
        "useg_train_seconds_left": 540.0,
        "useg_train_not_finite": 0.0,
        "total": 7.5,
        "mask": 2.5,
    }
    log.log(31, {"total": 7.0, "mask": 2.0}, 538.0, is_last=False)
    assert read_textfile(path)["useg_train_step"] == 30.0  # too soon to be written again
    log.log(300, {"total": 1.0, "mask": 0.5}, 0.0, is_last=True)
    log.mark_failed()
    values = read_textfile(path)
    assert (values["useg_train_not_finite"], values["useg_train_step"], values["total"]) == (1.0, 300.0, 1.0)
    assert [each.name for each in path.parent.iterdir()] == ["useg.prom"]


TIMEOUT_S = 240
STEPS = 12


def test_a_batch_is_divided_in_order_and_evenly() -> None:
    assert [slice_batch(12, 6, rank, 2) for rank in (0, 1)] == [(12, 3), (15, 3)]
    with pytest.raises(ConfigError, match="a batch of 5 cannot be divided among 2 processes"):
        slice_batch(0, 5, 0, 2)


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
    train(tiny_store, RunOptions(out=tmp_path / "one"), config)
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
