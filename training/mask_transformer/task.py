"""Training task of the mask transformer: its decoder is trained on the features of a frozen encoder."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

from model.checkpoints.dino import load_encoder
from model.checkpoints.runs import RunInfo
from model.networks.interface import normalize
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, intermediate_layers
from training.data.dataset import PseudoLabelDataset
from training.data.features import open_cache
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.feature_dataset import FeatureBatch, FeatureDataset
from training.mask_transformer.losses import mask_transformer_losses
from training.mask_transformer.pixel_dataset import PixelBatch, PixelDataset, augment_batch
from training.mask_transformer.samples import LabelReader, make_targets, select_instances
from training.trainer.task import Losses, PhotoSampler, TrainingTask, copy_encoder, make_provenance


class MaskTransformerTask(TrainingTask[FeatureBatch | PixelBatch]):
    """Trains the decoder of a mask transformer."""

    config: MaskTransformerTrainConfig
    module: MaskDecoder

    def __init__(
        self, dataset: PseudoLabelDataset, features: Path, run: Path, config: MaskTransformerTrainConfig
    ) -> None:
        """Copy the encoder into the run. `features` is the folder of the feature cache."""
        self.config = config
        labels = dataset.read_config()
        sampler = PhotoSampler(photos=dataset.read_photos(), seed=config.seed)
        annotations = select_instances(dataset, config.max_targets) if config.target_source == "instances" else None
        reader = LabelReader(thing_clusters=labels.thing_clusters, annotations=annotations)
        self._samples: FeatureDataset | PixelDataset
        if config.inputs == "pixels":
            self._samples = PixelDataset(sampler, reader, labels.side_px, config)
        else:
            cache = open_cache(features, labels.encoder_hash, labels.side_px)
            self._samples = FeatureDataset(sampler, cache, reader, labels.side_px, config)
        encoder_file = copy_encoder(labels.encoder, labels.encoder_hash, run)
        encoder = load_encoder(str(run / encoder_file), labels.side_px)
        torch.manual_seed(config.seed)
        decoder_config = DecoderConfig(
            side_px=labels.side_px,
            thing_clusters=labels.thing_clusters,
            stuff_clusters=labels.stuff_clusters,
            num_queries=config.num_queries,
            num_layers=config.num_decoder_layers,
        )
        self.module = MaskDecoder(decoder_config, encoder.config)
        self._encoder = encoder if config.inputs == "pixels" else None
        self.run_info = RunInfo(
            network="mask_transformer",
            network_config=decoder_config,
            encoder_file=encoder_file,
            step=0,
            provenance=make_provenance(labels, len(sampler.photos)),
            train_config=asdict(config),
        )

    def make_optimizer(self) -> AdamW:
        """Weight decay for matrices, none for biases, norms and learned queries."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.module.named_parameters():
            (decayed if parameter.ndim > 1 and name not in ("queries", "position") else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.config.learning_rate)

    def load_batch(self, first: int, count: int) -> FeatureBatch | PixelBatch:
        return self._samples.load_batch(first, count)

    def compute_losses(self, batch: FeatureBatch | PixelBatch, step: int) -> Losses:
        inputs = self._encode(batch) if isinstance(batch, PixelBatch) else batch
        # Channels-last: a step takes 0.86 of the CPU time.
        pixels = normalize(inputs.images.pixels).contiguous(memory_format=torch.channels_last)
        output = self.module(inputs.features, pixels, with_aux=True)
        targets = make_targets(inputs.images, droploss=self.config.droploss)
        return mask_transformer_losses(output, targets, self.config.no_object_from_score)

    @torch.no_grad()
    def _encode(self, batch: PixelBatch) -> FeatureBatch:
        """Augment a batch of photos and compute their features."""
        assert self._encoder is not None, "the encoder is kept for pixel inputs"
        encoder = self._encoder.to(batch.images.pixels.device)
        images = augment_batch(batch.images, batch.params, encoder.config.grid_size * encoder.config.patch_px)
        features = encoder(normalize(images.pixels), intermediate_layers(encoder.config.depth))
        return FeatureBatch(features=features, images=images, photos=batch.photos)
