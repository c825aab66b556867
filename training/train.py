"""Trains a network of either architecture on a label dataset."""

import math
from pathlib import Path
from typing import Any

import torch

from model.errors import BackendUnavailable, ConfigError
from training.data.dataset import PseudoLabelDataset
from training.data.encoders import warn_about_other_encoder
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.task import MaskTransformerTask
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.task import CascadeTask
from training.trainer.task import TrainingTask
from training.trainer.trainer import Trainer, TrainReport


def train(
    dataset: PseudoLabelDataset,
    features: Path,
    run: Path,
    config: MaskTransformerTrainConfig | CascadeTrainConfig,
    device: str = "cpu",
    *,
    init_weights: Path | None = None,
    backbone_weights: str = "",
    max_seconds: float = math.inf,
    prometheus_textfile: Path | None = None,
) -> TrainReport:
    """Train the network of the configuration and write a run; a run that exists is resumed.

    `features` is the folder of the feature cache, `init_weights` a run or artifact to start from, `backbone_weights`
    the path or URL of a published ResNet-50 for a cascade. See `Trainer` for the rest.
    Raises BackendUnavailable without a CUDA device, and ConfigError if the network has no ResNet-50.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no CUDA device: use --device cpu")
    if backbone_weights and getattr(config, "backbone", None) != "resnet50":
        raise ConfigError(f"{backbone_weights}: backbone weights need a panoptic cascade with --backbone resnet50")
    task: TrainingTask[Any]
    match config:
        case MaskTransformerTrainConfig():
            task = MaskTransformerTask(dataset, features, run, config)
            if init_weights:
                warn_about_other_encoder(init_weights, run / task.run_info.encoder_file)
        case CascadeTrainConfig():
            task = CascadeTask(dataset, config, backbone_weights)
    trainer = Trainer[Any](
        task,
        run,
        device,
        init_weights=init_weights,
        prometheus_textfile=prometheus_textfile,
    )
    return trainer.train(max_seconds)
