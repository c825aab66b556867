"""Pseudo-labels to a run: a decoder fitted to a frozen encoder's cached features, resumable at any step."""

import logging
import math
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from model.errors import CheckpointError, ConfigError, TrainingError
from model.files import hash_file, replace_file
from model.network.mask_transformer import DecoderShape, MaskDecoder, normalise
from model.run import ENCODER_STEM, RunCard, write_run
from model.weights.checkpoints import DEFAULT_CACHE, describe_encoder, fetch, load_encoder
from training.checkpoint import load_checkpoint, read_facts, write_checkpoint
from training.features import open_cache
from training.fitting.data import Batch, Samples
from training.fitting.history import append_losses, forget_after
from training.fitting.losses import compute_losses
from training.fitting.recipe import FitConfig
from training.interruption import hold_interrupts
from training.labels.store import LabelConfig, LabelStore, StoredPhoto
from training.progress import Progress

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
HISTORY_FILE = "history.csv"


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Where a fit ended."""

    step: int
    losses: dict[str, float]


class Fit:
    """A decoder, its optimiser and how far they are."""

    def __init__(self, store: LabelStore, features: Path, run: Path, config: FitConfig) -> None:
        """Take up the checkpoint in `run`, or begin. Raises ConfigError if the run was begun with another recipe."""
        self.config = config
        self._run = run
        labels = store.read_config()
        photos = store.read_photos()
        self._samples = _open_samples(labels, photos, features, config)
        encoder_file = _keep_encoder(labels.encoder, labels.encoder_hash, run)
        encoder = load_encoder(str(run / encoder_file), labels.side_px)
        torch.manual_seed(config.seed)
        shape = DecoderShape(
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            stuff_clusters=labels.stuff_clusters,
            queries=config.queries,
            layers=config.layers,
        )
        self.decoder = MaskDecoder(shape, encoder.shape)
        self._optimiser = AdamW(_group_parameters(self.decoder, config.weight_decay), lr=config.learning_rate)
        self.step = 0
        self._card = RunCard(
            network="mask_transformer",
            shape=shape,
            encoder_file=encoder_file,
            step=0,
            provenance=_describe_sources(labels, len(photos)),
            fit=asdict(config),
        )
        if (run / CHECKPOINT_FILE).exists():
            self._resume()
        forget_after(run / HISTORY_FILE, self.step)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One optimiser step. Raises TrainingError, naming the photos, if the loss or its gradient is not finite."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.config.learning_rate * schedule(self.step, self.config)
        prediction = self.decoder(batch.features, normalise(batch.pixels), is_deep=True)
        losses = compute_losses(prediction, batch.targets)
        figures = losses.as_floats()
        self._require_finite("loss", figures["total"], batch)
        self._optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = float(nn.utils.clip_grad_norm_(self.decoder.parameters(), self.config.clip))
        self._require_finite("gradient", norm, batch)
        self._optimiser.step()
        self.step += 1
        return figures

    def batches(self) -> Generator[Batch]:
        """What is left of the walk, the next batch being read while one is used."""
        size = self.config.batch
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self._samples.read, self.step * size, size)
            for step in range(self.step, self.config.steps):
                batch = upcoming.result()
                if step + 1 < self.config.steps:
                    upcoming = reader.submit(self._samples.read, (step + 1) * size, size)
                yield batch

    def save(self) -> None:
        """Write the checkpoint, then the run that can be exported."""
        facts = {"step": self.step, "fit": asdict(self.config), "provenance": self._card.provenance}
        write_checkpoint(self._run / CHECKPOINT_FILE, self.decoder, self._optimiser, facts)
        write_run(self._run, replace(self._card, step=self.step), self.decoder)

    def _require_finite(self, name: str, value: float, batch: Batch) -> None:
        if not math.isfinite(value):
            photos = ", ".join(path.name for path in batch.photos)
            raise TrainingError(f"the {name} is {value} at step {self.step}, on {photos} (and what was pasted there)")

    def _resume(self) -> None:
        path = self._run / CHECKPOINT_FILE
        facts = read_facts(path)
        changed = [key for key, value in asdict(self.config).items() if facts["fit"].get(key) != value]
        if facts["provenance"] != self._card.provenance:
            changed.append("label store")
        if changed:
            raise ConfigError(f"{self._run} was begun with another {', '.join(changed)}: choose another --out")
        load_checkpoint(path, self.decoder, self._optimiser)
        self.step = int(facts["step"])
        logger.info("resumed %s at step %d of %d", self._run, self.step, self.config.steps)


def fit(store: LabelStore, features: Path, run: Path, config: FitConfig) -> FitReport:
    """Fit to the end and leave a run; killed at any moment, it goes on from the last checkpoint.

    Ctrl-C takes effect after the step in hand, which is saved: raises KeyboardInterrupt then.
    """
    state = Fit(store, features, run, config)
    losses: dict[str, float] = {}
    progress = Progress("fit", config.steps, unit="step", done=state.step)
    with progress, hold_interrupts() as interruption, closing(state.batches()) as batches:
        for batch in batches:
            losses = state.advance(batch)
            append_losses(run / HISTORY_FILE, state.step, losses)
            progress.advance(note=f"loss {losses['total']:.3f}")
            if interruption.is_wished or state.step % config.checkpoint_every == 0 or state.step == config.steps:
                state.save()
            if interruption.is_wished:
                raise KeyboardInterrupt
    return FitReport(step=state.step, losses=losses)


def schedule(step: int, config: FitConfig) -> float:
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, round(config.warm_up * config.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))


def _open_samples(labels: LabelConfig, photos: list[StoredPhoto], features: Path, config: FitConfig) -> Samples:
    return Samples(
        photos=photos,
        cache=open_cache(features, labels.encoder_hash, labels.side_px),
        side_px=labels.side_px,
        thing_clusters=labels.thing_clusters,
        seed=config.seed,
        paste_rate=config.paste_rate,
    )


def _keep_encoder(source: str, expected_hash: str, run: Path) -> str:
    """Copy the encoder into the run, once; returns its name there. Raises CheckpointError if it has changed."""
    name = f"{ENCODER_STEM}{Path(source).suffix}"
    if not (run / name).exists():
        with replace_file(run / name) as sibling:
            shutil.copyfile(fetch(source, DEFAULT_CACHE), sibling)
    if hash_file(run / name) != expected_hash:
        raise CheckpointError(f"{run / name} is not the encoder that the labels were made with")
    return name


def _describe_sources(labels: LabelConfig, photos: int) -> dict[str, Any]:
    """The provenance that goes into run and artifact: no paths of this machine."""
    here = ("photos", "encoder", "maps")
    settings = {key: value for key, value in asdict(labels).items() if not key.startswith(here)}
    return {
        "encoder": {"sha256": labels.encoder_hash, "origin": describe_encoder(labels.encoder_hash)},
        "photos": {"count": photos, "sha256": labels.photos_hash, "note": settings.pop("note")},
        "labels": settings,
    }


def _group_parameters(decoder: MaskDecoder, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: not for biases, norms and learned queries."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in decoder.named_parameters():
        (decayed if parameter.ndim > 1 and name not in ("queries", "position") else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
