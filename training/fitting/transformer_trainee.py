"""The mask transformer's decoder, taught by labels on a frozen encoder's cached features."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from model.network.mask_transformer import DecoderShape, MaskDecoder, normalise
from model.run import RunCard
from model.weights.checkpoints import load_encoder
from training.features import open_cache
from training.fitting.data import Batch, Samples
from training.fitting.losses import Losses, compute_losses
from training.fitting.recipe import FitConfig
from training.fitting.sources import describe_sources, keep_encoder
from training.labels.store import LabelStore


class TransformerTrainee:
    """See `training.fitting.trainer.Trainee`."""

    def __init__(self, store: LabelStore, features: Path, run: Path, recipe: FitConfig) -> None:
        self.recipe = recipe
        labels, photos = store.read_config(), store.read_photos()
        self._samples = Samples(
            photos=photos,
            cache=open_cache(features, labels.encoder_hash, labels.side_px),
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            seed=recipe.seed,
            paste_rate=recipe.paste_rate,
        )
        encoder_file = keep_encoder(labels.encoder, labels.encoder_hash, run)
        encoder = load_encoder(str(run / encoder_file), labels.side_px)
        torch.manual_seed(recipe.seed)
        shape = DecoderShape(
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            stuff_clusters=labels.stuff_clusters,
            queries=recipe.queries,
            layers=recipe.layers,
        )
        self.module = MaskDecoder(shape, encoder.shape)
        self.card = RunCard(
            network="mask_transformer",
            shape=shape,
            encoder_file=encoder_file,
            step=0,
            provenance=describe_sources(labels, len(photos)),
            fit=asdict(recipe),
        )

    def make_optimiser(self) -> AdamW:
        return AdamW(group_parameters(self.module, self.recipe.weight_decay), lr=self.recipe.learning_rate)

    def schedule(self, step: int) -> float:
        return schedule(step, self.recipe)

    def read(self, first: int, count: int) -> Batch:
        return self._samples.read(first, count)

    def compute_losses(self, batch: Batch, step: int) -> Losses:
        return compute_losses(self.module(batch.features, normalise(batch.pixels), is_deep=True), batch.targets)

    def finish(self, module: nn.Module) -> None:
        """Its norms have no statistics."""


def schedule(step: int, recipe: FitConfig) -> float:
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, round(recipe.warm_up * recipe.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, recipe.steps - rise)))


def group_parameters(decoder: MaskDecoder, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: not for biases, norms and learned queries."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in decoder.named_parameters():
        (decayed if parameter.ndim > 1 and name not in ("queries", "position") else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
