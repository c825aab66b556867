"""Training task of the mask transformer: its decoder is trained on the features of a frozen encoder."""

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
from training.data.dataset import PseudoLabelDataset
from training.data.features import open_cache, resolve_layers
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.feature_dataset import DecoderBatch, FeatureDataset
from training.mask_transformer.losses import MaskTransformerLosses, mask_transformer_losses
from training.mask_transformer.pixel_dataset import PixelBatch, PixelDataset, augment_batch, to_targets
from training.mask_transformer.targets import InstanceMasks, LabelReader, Target
from training.pseudo_labels.codebook import load_codebook
from training.trainer.provenance import copy_encoder, make_provenance
from training.trainer.task import PhotoSampler


class MaskTransformerTask:
    """Implements `training.trainer.task.TrainingTask`."""

    def __init__(
        self, dataset: PseudoLabelDataset, features: Path, run: Path, config: MaskTransformerTrainConfig
    ) -> None:
        """Copy the encoder into the run. `features` is the folder of the feature cache."""
        self.config = config
        labels = dataset.read_config()
        self._samples = make_dataset(dataset, features, config)
        encoder_file = copy_encoder(labels.encoder, labels.encoder_hash, run)
        encoder = load_encoder(str(run / encoder_file), labels.side_px)
        self._embedding_targets = None
        if config.query_embeddings:
            self._embedding_targets = MaskEmbeddingTargets.load(dataset, encoder.config.depth)
        torch.manual_seed(config.seed)
        decoder_config = DecoderConfig(
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            stuff_clusters=labels.stuff_clusters,
            num_queries=config.num_queries,
            num_layers=config.num_decoder_layers,
            embedding_dim=self._embedding_targets.size if self._embedding_targets else 0,
        )
        self.module = MaskDecoder(decoder_config, encoder.config)
        self._encoder = encoder if config.inputs == "pixels" else None
        self.run_info = RunInfo(
            network="mask_transformer",
            network_config=decoder_config,
            encoder_file=encoder_file,
            step=0,
            provenance=make_provenance(labels, len(self._samples.sampler.photos)),
            train_config=asdict(config),
        )

    def make_optimizer(self) -> AdamW:
        return AdamW(decoder_param_groups(self.module, self.config.weight_decay), lr=self.config.learning_rate)

    def lr_factor(self, step: int) -> float:
        return cosine_lr_factor(step, self.config)

    def load_batch(self, first: int, count: int) -> DecoderBatch | PixelBatch:
        return self._samples.load_batch(first, count)

    def compute_losses(self, batch: DecoderBatch | PixelBatch, step: int) -> MaskTransformerLosses:
        inputs = batch if isinstance(batch, DecoderBatch) else self._encode(batch)
        # Channels-last: a step takes 0.86 of the CPU time.
        pixels = normalize(inputs.pixels).contiguous(memory_format=torch.channels_last)
        targets = inputs.targets
        if self._embedding_targets is not None:
            targets = self._embedding_targets.add_to(inputs.features, targets)
        output = self.module(inputs.features, pixels, with_aux=True)
        return mask_transformer_losses(output, targets, self.config.no_object_from_score)

    @torch.no_grad()
    def _encode(self, batch: PixelBatch) -> DecoderBatch:
        """Augment a batch of photos and compute their features."""
        assert self._encoder is not None, "the encoder is kept for pixel inputs"
        encoder = self._encoder.to(batch.images.pixels.device)
        images = augment_batch(batch.images, batch.params, encoder.config.grid_size * encoder.config.patch_px)
        return DecoderBatch(
            features=encoder(normalize(images.pixels), intermediate_layers(encoder.config.depth)),
            pixels=images.pixels,
            targets=to_targets(images, droploss=self.config.droploss),
            photos=batch.photos,
        )

    def on_train_end(self, module: nn.Module) -> None:
        """Nothing to do: the decoder has no batch norms."""


def make_dataset(
    dataset: PseudoLabelDataset, features: Path, config: MaskTransformerTrainConfig
) -> FeatureDataset | PixelDataset:
    """Return the training samples of a label dataset for the configured inputs."""
    labels = dataset.read_config()
    sampler = PhotoSampler(photos=dataset.read_photos(), seed=config.seed)
    from_instances = config.target_source == "instances"
    instance_masks = InstanceMasks.load(dataset, config.max_targets) if from_instances else None
    reader = LabelReader(thing_clusters=labels.thing_clusters, instance_masks=instance_masks)
    if config.inputs == "pixels":
        return PixelDataset(sampler=sampler, labels=reader, side_px=labels.side_px, config=config)
    cache = open_cache(features, labels.encoder_hash, labels.side_px)
    return FeatureDataset(sampler=sampler, cache=cache, labels=reader, side_px=labels.side_px, config=config)


def cosine_lr_factor(step: int, config: MaskTransformerTrainConfig) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up, then half a cosine."""
    warmup = max(1, round(config.warmup_ratio * config.max_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, config.max_steps - warmup)))


def decoder_param_groups(decoder: MaskDecoder, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters: weight decay for matrices, none for biases, norms and learned queries."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in decoder.named_parameters():
        (decayed if parameter.ndim > 1 and name not in ("queries", "position") else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True, kw_only=True)
class MaskEmbeddingTargets:
    """Targets of the embedding head: whitened features of the instances, as the codebook of the labels whitens."""

    layers: tuple[int, ...]
    """Indices of the codebook's layers among the features."""
    mean: Float[Tensor, "E"]
    projection: Float[Tensor, "E P"]

    @classmethod
    def load(cls, dataset: PseudoLabelDataset, depth: int) -> Self:
        """Load the whitening of the dataset's codebook, for an encoder of this depth.

        Raises ConfigError if the decoder does not read the encoder blocks that the codebook was fitted on.
        """
        codebook, read = load_codebook(dataset.codebook), intermediate_layers(depth)
        layers = resolve_layers(codebook.config.layers, depth)
        if not set(layers) <= set(read):
            raise ConfigError(
                f"the codebook uses encoder blocks {layers}, the decoder reads {read}: use --no-query-embeddings"
            )
        return cls(
            layers=tuple(read.index(each) for each in layers),
            mean=torch.from_numpy(codebook.mean).float(),
            projection=torch.from_numpy(codebook.projection).float(),
        )

    @property
    def size(self) -> int:
        """Dimension of an embedding."""
        return self.projection.shape[1]

    @torch.no_grad()
    def add_to(self, features: Float[Tensor, "T B N C"], targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return the targets with embeddings: the mean of the whitened patches under each mask, as unit vectors.

        Unlike in the `MaskedAverageEmbedder` of the labels, a patch is weighted by the fraction that is masked.
        """
        with torch.autocast(features.device.type, enabled=False):
            patches = self._whiten(features.float())
        grid = round(patches.shape[1] ** 0.5)
        updated = []
        for target, tokens in zip(targets, patches, strict=True):
            fractions = functional.adaptive_avg_pool2d(target.masks, grid).flatten(1)
            updated.append(replace(target, embeddings=functional.normalize(fractions @ tokens, dim=1)))
        return tuple(updated)

    def _whiten(self, features: Float[Tensor, "T B N C"]) -> Float[Tensor, "B N P"]:
        layers = [functional.layer_norm(features[layer], features.shape[-1:]) for layer in self.layers]
        mean, projection = (each.to(features.device) for each in (self.mean, self.projection))
        return functional.normalize(torch.cat(layers, 2) @ projection - mean @ projection, dim=2)
