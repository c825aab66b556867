"""One loop for every network: it can be killed at any moment, and goes on as if it had not been."""

import copy
import json
import logging
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from model.errors import ConfigError, TrainingError
from model.run import write_run
from training.checkpoint import load_checkpoint, read_facts, write_checkpoint
from training.fitting.loop.code_version import read_commit
from training.fitting.loop.curves import draw_curves
from training.fitting.loop.gauges import FitGauges
from training.fitting.loop.history import append_losses, forget_after
from training.fitting.loop.moving_average import follow
from training.fitting.loop.ranks import ALONE, Ranks
from training.fitting.loop.recipe import Recipe
from training.fitting.loop.sources import are_same_sources
from training.fitting.loop.trainee import BatchType, Trainee
from training.fitting.loop.warm_start import warm_start
from training.interruption import hold_interrupts
from training.progress import Progress

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
HISTORY_FILE = "history.csv"
CURVES_FILE = "curves.png"


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Where a fit ended."""

    step: int
    losses: dict[str, float]


class Trainer(Generic[BatchType]):
    """A trainee, its optimiser and how far they are."""

    def __init__(
        self,
        trainee: Trainee[BatchType],
        run: Path,
        device: str = "cpu",
        *,
        start: Path | None = None,
        ranks: Ranks = ALONE,
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
        if commit := read_commit():
            self._card = replace(self._card, fit={**self._card.fit, "commit": commit})
        self._run = run
        self._recipe = trainee.recipe
        self._gauges = FitGauges(metrics, run, trainee.recipe.steps) if metrics and ranks.is_first else None
        self._device = torch.device(device)
        trainee.module.to(self._device)
        self._optimiser = trainee.make_optimiser()
        self._trained = [each for each in trainee.module.parameters() if each.requires_grad]
        self._average = copy.deepcopy(trainee.module) if self._recipe.average_decay else None
        if (run / CHECKPOINT_FILE).exists():
            self._resume()
        if ranks.is_first:
            forget_after(run / HISTORY_FILE, self.step)

    def train(self, limit_s: float = math.inf) -> FitReport:
        """Fit to the end, or until so many seconds are over, and leave a run; it goes on from its last checkpoint.

        Ctrl-C takes effect after the step in hand, which is saved: raises KeyboardInterrupt then.
        """
        steps, every = self._recipe.steps, self._recipe.checkpoint_every
        ends = time.monotonic() + limit_s
        losses: dict[str, float] = {}
        progress = Progress("fit", steps, unit="step", done=self.step, is_shown=self._ranks.is_first)
        with progress, hold_interrupts() as interruption, closing(self.batches()) as batches:
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
        return FitReport(step=self.step, losses=losses)

    def advance(self, batch: BatchType) -> dict[str, float]:
        """One optimiser step. Raises TrainingError, naming the photos, if the loss or its gradient is not finite."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.learning_rate * self.trainee.schedule(self.step)
        is_half = self._recipe.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
            losses = self.trainee.compute_losses(move(batch, self._device), self.step)
        figures = losses.as_floats()
        self._require_finite("loss", figures["total"], batch)
        self._optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self._ranks.average_gradients(self._trained)
        norm = clip_gradients(self._trained, self._recipe.clip, is_each=self._recipe.is_clipped_each)
        self._require_finite("gradient", norm, batch)
        self._optimiser.step()
        if self._average is not None:
            follow(self._average, self.trainee.module, self._recipe.average_decay, self.step)
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
        draw_curves(
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
        changed = list_changes(facts["fit"], self._recipe)
        if not are_same_sources(facts["provenance"], self._card.provenance):
            changed.append("label store or start")
        if changed:
            raise ConfigError(f"{self._run} was begun with another {', '.join(changed)}: choose another --out")
        load_checkpoint(path, self.trainee.module, self._optimiser, self._average)
        self.step = int(facts["step"])
        logger.info("resumed %s at step %d of %d", self._run, self.step, self._recipe.steps)


def list_changes(stored: dict[str, Any], recipe: Recipe) -> list[str]:
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


def move(value: ValueType, device: torch.device) -> ValueType:
    """The same with all tensors on the device."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        moved = tuple(move(each, device) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{entry.name: move(getattr(value, entry.name), device) for entry in fields(value)})
    return moved  # type: ignore[no-any-return]
