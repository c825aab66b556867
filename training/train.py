"""Trains a network of either architecture on a label dataset."""

from typing import Any

import torch

from model.errors import BackendUnavailable, ConfigError
from training.data.dataset import PseudoLabelDataset
from training.data.encoders import warn_about_other_encoder
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.task import MaskTransformerTask
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.task import CascadeTask
from training.trainer.config import RunOptions
from training.trainer.task import TrainingTask
from training.trainer.trainer import Trainer, TrainReport


def train(
    dataset: PseudoLabelDataset,
    options: RunOptions,
    config: MaskTransformerTrainConfig | CascadeTrainConfig,
    backbone_weights: str = "",
) -> TrainReport:
    """Train the network of the configuration and write a run; a run that exists is resumed.

    `backbone_weights` is the path or URL of a published ResNet-50 for a cascade.
    Raises BackendUnavailable without a CUDA device, and ConfigError if the network has no ResNet-50.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no CUDA device: use --device cpu")
    if backbone_weights and getattr(config, "backbone", None) != "resnet50":
        raise ConfigError(f"{backbone_weights}: backbone weights need a panoptic cascade with --backbone resnet50")
    task: TrainingTask[Any]
    match config:
        case MaskTransformerTrainConfig():
            task = MaskTransformerTask(dataset, options.features or dataset.features, options.out, config)
            if options.init_weights:
                warn_about_other_encoder(options.init_weights, options.out / task.run_info.encoder_file)
        case CascadeTrainConfig():
            task = CascadeTask(dataset, config, backbone_weights)
    return Trainer[Any](task, options).train()
