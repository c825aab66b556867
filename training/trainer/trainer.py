"""One loop for every network: it can be killed at any moment, and goes on as if it had not been."""

import copy
import json
import logging
import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from model.checkpoints.runs import write_run
from model.errors import ConfigError, TrainingError
from training.progress import Progress
from training.trainer.checkpoint import load_checkpoint, read_facts, warm_start, write_checkpoint
from training.trainer.config import TrainConfig
from training.trainer.distributed import SINGLE_PROCESS, DistributedContext
from training.trainer.loggers import PrometheusTextfileLogger, append_losses, forget_after, plot_losses
from training.trainer.provenance import git_commit, is_same_provenance
from training.trainer.task import BatchType, TrainingTask

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
HISTORY_FILE = "history.csv"
CURVES_FILE = "curves.png"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Where a fit ended."""

    step: int
    losses: dict[str, float]


class Trainer(Generic[BatchType]):
    """A trainee, its optimiser and how far they are."""

    def __init__(
        self,
        trainee: TrainingTask[BatchType],
        run: Path,
        device: str = "cpu",
        *,
        start: Path | None = None,
        ranks: DistributedContext = SINGLE_PROCESS,
        metrics: Path | None = None,
    ) -> None:
        """Take up the checkpoint in `run`, or begin, from the weights of the run `start` if one is given.

        Of several `ranks`, all do the same but for their samples, and the first writes; `metrics` is a file for it.
        Raises ConfigError if the run was begun with another recipe, or if `start` does not fit.
        """
        ranks.require_shares(trainee.recipe.batch)
        self._ranks = ranks
        self.trainee = trainee
        self.step = 0
        self._card = trainee.card
        if start is not None:
            taken = warm_start(trainee.module, trainee.card.network, start)
            self._card = replace(self._card, provenance={**self._card.provenance, "start": taken.describe()})
        if commit := git_commit():
            self._card = replace(self._card, train_config={**self._card.train_config, "commit": commit})
        self._run = run
        self._recipe = trainee.recipe
        self._gauges = (
            PrometheusTextfileLogger(metrics, run, trainee.recipe.steps) if metrics and ranks.is_first else None
        )
        self._device = torch.device(device)
        trainee.module.to(self._device)
        self._optimiser = trainee.make_optimiser()
        self._trained = [each for each in trainee.module.parameters() if each.requires_grad]
        self._average = copy.deepcopy(trainee.module) if self._recipe.average_decay else None
        if (run / CHECKPOINT_FILE).exists():
            self._resume()
        if ranks.is_first:
            forget_after(run / HISTORY_FILE, self.step)

    def train(self, limit_s: float = math.inf) -> TrainReport:
        """Fit to the end, or until so many seconds are over, and leave a run; it goes on from its last checkpoint.

        Ctrl-C takes effect after the step in hand, which is saved: raises KeyboardInterrupt then.
        """
        steps, every = self._recipe.steps, self._recipe.checkpoint_every
        ends = time.monotonic() + limit_s
        losses: dict[str, float] = {}
        progress = Progress("fit", steps, unit="step", done=self.step, is_shown=self._ranks.is_first)
        with progress, defer_keyboard_interrupt() as interruption, closing(self.batches()) as batches:
            for batch in batches:
                losses = self._ranks.average(self.advance(batch))
                is_interrupted = self._ranks.agree(interruption.is_wished)
                is_last = is_interrupted or self._ranks.agree(time.monotonic() >= ends) or self.step == steps
                if self._ranks.is_first:
                    append_losses(self._run / HISTORY_FILE, self.step, losses)
                    progress.advance(note=f"loss {losses['total']:.3f}")
                    if self._gauges:
                        self._gauges.tell(self.step, losses, progress.left_s, is_last=is_last)
                    if is_last or self.step % every == 0:
                        self.save()
                if is_interrupted:
                    raise KeyboardInterrupt
                if is_last:
                    break
        return TrainReport(step=self.step, losses=losses)

    def advance(self, batch: BatchType) -> dict[str, float]:
        """One optimiser step. Raises TrainingError, naming the photos, if the loss or its gradient is not finite."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.learning_rate * self.trainee.schedule(self.step)
        is_half = self._recipe.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
            losses = self.trainee.compute_losses(to_device(batch, self._device), self.step)
        figures = losses.as_floats()
        self._require_finite("loss", figures["total"], batch)
        self._optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self._ranks.average_gradients(self._trained)
        norm = clip_gradients(self._trained, self._recipe.clip, is_each=self._recipe.is_clipped_each)
        self._require_finite("gradient", norm, batch)
        self._optimiser.step()
        if self._average is not None:
            update_ema(self._average, self.trainee.module, self._recipe.average_decay, self.step)
        self.step += 1
        return figures

    def batches(self) -> Generator[BatchType]:
        """What is left of the walk, this rank's share of it, the next batch being read while one is used."""
        size = self._recipe.batch
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self.trainee.read, *self._ranks.share(self.step * size, size))
            for step in range(self.step, self._recipe.steps):
                batch = upcoming.result()
                if step + 1 < self._recipe.steps:
                    upcoming = reader.submit(self.trainee.read, *self._ranks.share((step + 1) * size, size))
                yield batch

    def save(self) -> None:
        """Write the checkpoint, then the run that can be exported, of averaged weights if there are such."""
        module = self.trainee.module
        facts = {"step": self.step, "fit": asdict(self._recipe), "provenance": self._card.provenance}
        write_checkpoint(self._run / CHECKPOINT_FILE, module, self._optimiser, facts, self._average)
        written = module if self._average is None else self._average
        if self.step == self._recipe.steps:
            self.trainee.finish(written)
        write_run(self._run, replace(self._card, step=self.step), written)
        plot_losses(
            self._run / HISTORY_FILE, self._run / CURVES_FILE, f"{self._run.resolve().name}, step {self.step:,}"
        )

    def _require_finite(self, name: str, value: float, batch: BatchType) -> None:
        if not math.isfinite(value):
            photos = ", ".join(path.name for path in batch.photos)
            if self._gauges:
                self._gauges.fail()
            raise TrainingError(f"the {name} is {value} at step {self.step}, on {photos} (and what was pasted there)")

    def _resume(self) -> None:
        path = self._run / CHECKPOINT_FILE
        facts = read_facts(path)
        changed = changed_fields(facts["fit"], self._recipe)
        if not is_same_provenance(facts["provenance"], self._card.provenance):
            changed.append("label store or start")
        if changed:
            raise ConfigError(f"{self._run} was begun with another {', '.join(changed)}: choose another --out")
        load_checkpoint(path, self.trainee.module, self._optimiser, self._average)
        self.step = int(facts["step"])
        logger.info("resumed %s at step %d of %d", self._run, self.step, self._recipe.steps)


def changed_fields(stored: dict[str, Any], recipe: TrainConfig) -> list[str]:
    """Names of the recipe's fields that differ; one that is younger than what was stored had its default then."""
    defaults = {entry.name: entry.default for entry in fields(recipe)}
    given = json.loads(json.dumps(asdict(recipe)))  # as it was stored: JSON knows no tuples
    return [key for key, value in given.items() if stored.get(key, defaults[key]) != value]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, *, is_each: bool) -> float:
    """Shorten the gradients to a norm of `limit`, all together or each by itself; the norm, or the largest, before."""
    reached = [each for each in parameters if each.grad is not None]
    groups = [[each] for each in reached] if is_each else [reached]
    return float(torch.stack([nn.utils.clip_grad_norm_(group, limit) for group in groups]).max())


ValueType = TypeVar("ValueType")


def to_device(value: ValueType, device: torch.device) -> ValueType:
    """The same with all tensors on the device."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        moved = tuple(to_device(each, device) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{entry.name: to_device(getattr(value, entry.name), device) for entry in fields(value)})
    return moved  # type: ignore[no-any-return]


class InterruptFlag:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.is_wished = False

    def note(self, _signal: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.is_wished = True


@contextmanager
def defer_keyboard_interrupt() -> Iterator[InterruptFlag]:
    """Ctrl-C only sets `is_wished` until the block ends; main thread only."""
    interruption = InterruptFlag()
    previous = signal.signal(signal.SIGINT, interruption.note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
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
