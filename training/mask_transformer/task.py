"""The mask transformer's decoder, taught by labels on a frozen encoder's cached features."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from model.checkpoints.dino import load_encoder
from model.checkpoints.runs import RunInfo
from model.errors import ConfigError
from model.networks.interface import normalize
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, intermediate_layers
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import open_cache, resolve_layers
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.feature_dataset import DecoderBatch, FeatureDataset, Target
from training.mask_transformer.instances import InstanceMasks
from training.mask_transformer.losses import MaskTransformerLosses, compute_losses
from training.mask_transformer.pixel_dataset import PixelBatch, PixelDataset, augment, split
from training.pseudo_labels.codebook import load_codebook
from training.trainer.provenance import copy_encoder, make_provenance


class MaskTransformerTask:
    """See `training.trainer.trainer.Trainee`."""

    def __init__(
        self, store: PseudoLabelDataset, features: Path, run: Path, recipe: MaskTransformerTrainConfig
    ) -> None:
        self.recipe = recipe
        labels = store.read_config()
        photos = store.read_photos()
        self._samples = open_samples(store, photos, features, recipe)
        encoder_file = copy_encoder(labels.encoder, labels.encoder_hash, run)
        encoder = load_encoder(str(run / encoder_file), labels.side_px)
        self._whitening = MaskEmbeddingTargets.read(store, encoder.config.depth) if recipe.embeds else None
        torch.manual_seed(recipe.seed)
        shape = DecoderConfig(
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            stuff_clusters=labels.stuff_clusters,
            num_queries=recipe.queries,
            num_layers=recipe.layers,
            embedding_dim=self._whitening.size if self._whitening else 0,
        )
        self.module = MaskDecoder(shape, encoder.config)
        self._encoder = encoder if recipe.inputs == "pixels" else None
        self.card = RunInfo(
            network="mask_transformer",
            network_config=shape,
            encoder_file=encoder_file,
            step=0,
            provenance=make_provenance(labels, len(photos)),
            train_config=asdict(recipe),
        )

    def make_optimiser(self) -> AdamW:
        return AdamW(group_parameters(self.module, self.recipe.weight_decay), lr=self.recipe.learning_rate)

    def schedule(self, step: int) -> float:
        return schedule(step, self.recipe)

    def read(self, first: int, count: int) -> DecoderBatch | PixelBatch:
        return self._samples.read(first, count)

    def compute_losses(self, batch: DecoderBatch | PixelBatch, step: int) -> MaskTransformerLosses:
        seen = batch if isinstance(batch, DecoderBatch) else self._look(batch)
        # Channels last: a step takes 0.86 of the CPU time.
        normalised = normalize(seen.pixels).contiguous(memory_format=torch.channels_last)
        targets = seen.targets if self._whitening is None else self._whitening.describe(seen.features, seen.targets)
        return compute_losses(self.module(seen.features, normalised, with_aux=True), targets, self.recipe.doubt)

    @torch.no_grad()
    def _look(self, batch: PixelBatch) -> DecoderBatch:
        """What the encoder makes of new pictures."""
        assert self._encoder is not None, "it is kept for pixels"
        encoder = self._encoder.to(batch.pictures.pixels.device)
        pictures = augment(batch.pictures, batch.drawn, encoder.config.grid_size * encoder.config.patch_px)
        return DecoderBatch(
            features=encoder(normalize(pictures.pixels), intermediate_layers(encoder.config.depth)),
            pixels=pictures.pixels,
            targets=split(pictures, drops_unknown=self.recipe.drops_unknown),
            photos=batch.photos,
        )

    def finish(self, module: nn.Module) -> None:
        """Its norms have no statistics."""


def open_samples(
    store: PseudoLabelDataset, photos: list[LabeledPhoto], features: Path, recipe: MaskTransformerTrainConfig
) -> FeatureDataset | PixelDataset:
    """The walk over a store's photos that a recipe asks for."""
    labels = store.read_config()
    whole_masks = InstanceMasks.read(store, recipe.most_targets) if recipe.targets == "instances" else None
    if recipe.inputs == "pixels":
        return PixelDataset(
            photos=photos,
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            seed=recipe.seed,
            paste_rate=recipe.paste_rate,
            crop_rate=recipe.crop_rate,
            jitter=recipe.jitter,
            pastes_alike=recipe.pastes_alike,
            whole_masks=whole_masks,
        )
    return FeatureDataset(
        photos=photos,
        cache=open_cache(features, labels.encoder_hash, labels.side_px),
        side_px=labels.side_px,
        thing_clusters=labels.thing_clusters,
        seed=recipe.seed,
        paste_rate=recipe.paste_rate,
        crop_rate=recipe.crop_rate,
        whole_masks=whole_masks,
        pastes_alike=recipe.pastes_alike,
        drops_unknown=recipe.drops_unknown,
    )


def schedule(step: int, recipe: MaskTransformerTrainConfig) -> float:
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


@dataclass(frozen=True, kw_only=True)
class MaskEmbeddingTargets:
    """A store's own, as its codebook has it."""

    layers: tuple[int, ...]
    """Positions of the codebook's layers among the features."""
    mean: Float[Tensor, "E"]
    projection: Float[Tensor, "E P"]

    @classmethod
    def read(cls, store: PseudoLabelDataset, depth: int) -> Self:
        """Raises ConfigError if the decoder does not read the blocks that the codebook was fitted on."""
        book, stored = load_codebook(store.codebook), intermediate_layers(depth)
        layers = resolve_layers(book.config.layers, depth)
        if not set(layers) <= set(stored):
            raise ConfigError(
                f"the codebook uses encoder blocks {layers}, the decoder reads {stored}: use --no-query-embeddings"
            )
        return cls(
            layers=tuple(stored.index(each) for each in layers),
            mean=torch.from_numpy(book.mean).float(),
            projection=torch.from_numpy(book.projection).float(),
        )

    @property
    def size(self) -> int:
        """Of a vector."""
        return self.projection.shape[1]

    @torch.no_grad()
    def describe(self, features: Float[Tensor, "T B N C"], targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """The targets with their vectors: the mean of the whitened patches under each mask, of unit length.

        As the label store's `MaskedAverageEmbedder`, but that a patch counts by its share in the mask.
        """
        with torch.autocast(features.device.type, enabled=False):
            tokens = self._whiten(features.float())
        grid = round(tokens.shape[1] ** 0.5)
        described = []
        for target, patches in zip(targets, tokens, strict=True):
            shares = functional.adaptive_avg_pool2d(target.masks, grid).flatten(1)
            described.append(replace(target, vectors=functional.normalize(shares @ patches, dim=1)))
        return tuple(described)

    def _whiten(self, features: Float[Tensor, "T B N C"]) -> Float[Tensor, "B N P"]:
        blocks = [functional.layer_norm(features[tap], features.shape[-1:]) for tap in self.layers]
        mean, projection = (each.to(features.device) for each in (self.mean, self.projection))
        return functional.normalize(torch.cat(blocks, 2) @ projection - mean @ projection, dim=2)
