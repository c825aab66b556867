"""The training loop of every network. A killed run continues from its last checkpoint with identical results."""

import json
import logging
import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from threading import Event
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from model.checkpoints.runs import write_run
from model.errors import ConfigError, TrainingError
from model.networks.mask_transformer import MaskDecoder
from model.networks.panoptic_cascade import PanopticCascade
from model.progress import Progress
from training.trainer.checkpoint import (
    load_checkpoint,
    load_initial_weights,
    read_checkpoint_metadata,
    write_checkpoint,
)
from training.trainer.config import RunOptions
from training.trainer.distributed import (
    all_reduce_any,
    all_reduce_gradients,
    all_reduce_mean,
    get_rank_and_world_size,
    is_main_process,
    slice_batch,
)
from training.trainer.loggers import RunLogger
from training.trainer.task import BatchType, TrainingTask, git_commit

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Result of a training run."""

    step: int
    """Finished optimizer steps."""
    losses: dict[str, float]
    """Losses of the last step of this call; empty if the run was already finished."""


class Trainer(Generic[BatchType]):
    """Trains the network of a task and writes a run: weights, checkpoint, logs and plots."""

    def __init__(self, task: TrainingTask[BatchType], options: RunOptions) -> None:
        """Load the checkpoint of the run if there is one; else start, from `init_weights` if given.

        All processes of a distributed run do the same on their own samples; the main process writes files and logs.
        Raises ConfigError if the run was started with another configuration, if `init_weights` do not match, or if
        the batch cannot be divided among the processes.
        """
        self.task = task
        self.step = 0
        self._run = options.out
        self._max_seconds = 60.0 * options.max_minutes
        self._config = task.config
        self._local_slice(0)
        self._run_info = task.run_info
        if options.init_weights is not None:
            initial = load_initial_weights(task.module, self._run_info.network, options.init_weights)
            self._run_info = replace(self._run_info, provenance={**self._run_info.provenance, "init_weights": initial})
        if commit := git_commit():
            self._run_info = replace(self._run_info, train_config={**self._run_info.train_config, "commit": commit})
        self._device = torch.device(options.device)
        task.module.to(self._device)
        self._optimizer = task.make_optimizer()
        self._trained = [each for each in task.module.parameters() if each.requires_grad]
        self._ema = make_ema(task.module, self._config.ema_decay) if self._config.ema_decay else None
        if (self._run / CHECKPOINT_FILE).exists():
            self._resume()
        self._logger: RunLogger | None = None
        if is_main_process():
            self._logger = RunLogger(self._run, self.step, self._config.max_steps, options.prometheus_textfile)

    def train(self) -> TrainReport:
        """Train to the last step, or until the time is up, and write the run.

        Ctrl-C takes effect after the current step, which is saved; raises KeyboardInterrupt then.
        """
        ends = time.monotonic() + self._max_seconds
        losses: dict[str, float] = {}
        progress = Progress(
            "train", self._config.max_steps, unit="step", done=self.step, is_shown=self._logger is not None
        )
        with progress, defer_keyboard_interrupt() as interrupt, ExitStack() as stack:
            if self._logger:
                stack.enter_context(closing(self._logger))
            for batch in stack.enter_context(closing(self.batches())):
                losses = all_reduce_mean(self.train_step(batch))
                is_interrupted = all_reduce_any(interrupt.is_set())
                is_time_up = all_reduce_any(time.monotonic() >= ends)
                is_last = is_interrupted or is_time_up or self.step == self._config.max_steps
                if self._logger:
                    progress.advance(note=f"loss {losses['total']:.3f}")
                    self._logger.log(self.step, losses, progress.left_s, is_last=is_last)
                    if is_last or self.step % self._config.checkpoint_interval == 0:
                        self.save()
                if is_interrupted:
                    raise KeyboardInterrupt
                if is_last:
                    break
        return TrainReport(step=self.step, losses=losses)

    def train_step(self, batch: BatchType) -> dict[str, float]:
        """Make one optimizer step and return the losses of this process.

        Raises TrainingError, with the names of the photos, if the loss or the gradient norm is not finite.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * self._config.lr_factor(self.step)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            losses = self.task.compute_losses(to_device(batch, self._device), self.step)
        values = losses.as_floats()
        self._check_finite("loss", values["total"], batch)
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        all_reduce_gradients(self._trained)
        norm = clip_gradients(self._trained, self._config.grad_clip_norm, per_parameter=self._config.clip_per_parameter)
        self._check_finite("gradient norm", norm, batch)
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update_parameters(self.task.module)
        self.step += 1
        return values

    def batches(self) -> Generator[BatchType]:
        """Yield this process's slice of the remaining batches; the next one loads while the current one is used."""
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self.task.load_batch, *self._local_slice(self.step))
            for following in range(self.step + 1, self._config.max_steps + 1):
                batch = upcoming.result()
                if following < self._config.max_steps:
                    upcoming = reader.submit(self.task.load_batch, *self._local_slice(following))
                yield batch

    def _local_slice(self, step: int) -> tuple[int, int]:
        """Return first sample and number of samples of this process in the batch of a step."""
        size = self._config.batch_size
        return slice_batch(step * size, size, *get_rank_and_world_size())

    def save(self) -> None:
        """Write the checkpoint, then the run with the averaged weights, or with the weights if there is no average."""
        metadata = {"step": self.step, "config": asdict(self._config), "provenance": self._run_info.provenance}
        write_checkpoint(self._run / CHECKPOINT_FILE, self.task.module, self._optimizer, metadata, self._ema)
        module = self.task.module if self._ema is None else cast("MaskDecoder | PanopticCascade", self._ema.module)
        if self.step == self._config.max_steps:
            self.task.on_train_end(module)
        write_run(self._run, replace(self._run_info, step=self.step), module)
        if self._logger:
            self._logger.flush()

    def _check_finite(self, name: str, value: float, batch: BatchType) -> None:
        if math.isfinite(value):
            return
        if self._logger:
            self._logger.mark_failed()
        photos = ", ".join(path.name for path in batch.photos)
        raise TrainingError(f"the {name} is {value} at step {self.step}; photos of the batch: {photos}")

    def _resume(self) -> None:
        path = self._run / CHECKPOINT_FILE
        metadata = read_checkpoint_metadata(path)
        # Both with lists, no tuples.
        current, provenance = json.loads(json.dumps([asdict(self._config), self._run_info.provenance]))
        stored = metadata["config"]
        changed = [name for name in sorted(current.keys() | stored.keys()) if stored.get(name) != current.get(name)]
        if metadata["provenance"] != provenance:
            changed.append("labels or init_weights")
        if changed:
            raise ConfigError(f"{self._run} was started with other {', '.join(changed)}: choose another --out")
        load_checkpoint(path, self.task.module, self._optimizer, self._ema)
        self.step = int(metadata["step"])
        logger.info("resumed %s at step %d of %d", self._run, self.step, self._config.max_steps)


def make_ema(module: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the weights and buffers, to be updated after every step.

    The decay of update n rises as (1 + n) / (10 + n) towards `decay`; with a constant one, a short run would keep
    much of its initial weights. Integer buffers are copied.
    """

    def update(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, current)
            return
        count = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + count) / (10.0 + count)))

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, *, per_parameter: bool) -> float:
    """Clip the gradients to `max_norm`, all together or each on its own; return the (largest) norm before."""
    reached = [each for each in parameters if each.grad is not None]
    groups = [[each] for each in reached] if per_parameter else [reached]
    return float(torch.stack([nn.utils.clip_grad_norm_(group, max_norm) for group in groups]).max())


ValueType = TypeVar("ValueType")


def to_device(value: ValueType, device: torch.device) -> ValueType:
    """Return a copy with all tensors on the device; tuples and dataclasses are searched."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        moved = tuple(to_device(each, device) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{entry.name: to_device(getattr(value, entry.name), device) for entry in fields(value)})
    return moved  # type: ignore[no-any-return]


@contextmanager
def defer_keyboard_interrupt() -> Iterator[Event]:
    """Within the block, let Ctrl-C only set an event; main thread only."""
    requested = Event()
    previous = signal.signal(signal.SIGINT, lambda _signal, _frame: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
