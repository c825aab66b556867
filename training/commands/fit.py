"""`useg-train train`: pseudo-labels to a run."""

import argparse
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from model.command import flag
from training.mask_transformer.config import MaskTransformerTrainConfig, TargetSource
from training.panoptic_cascade.config import Backbone, CascadeTrainConfig, CopyPaste
from training.presets import NETWORK_PRESETS, make_train_config
from training.trainer.config import InputKind, Precision, TrainConfig

NUMBERS = ("steps", "batch", "learning_rate", "average_decay", "seed", "checkpoint_every")
WORDS = {
    "precision": Precision,
    "backbone": Backbone,
    "inputs": InputKind,
    "targets": TargetSource,
    "pasting": CopyPaste,
}
SAMPLE_NUMBERS = ("queries", "paste_rate", "crop_rate", "most_targets", "doubt", "jitter")
SAMPLE_SWITCHES = ("pastes_alike", "drops_unknown", "embeds")
"""Of the mask transformer's recipe."""
CASCADE_NUMBERS = ("drop_iou", "ignored_share")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--network", choices=NETWORK_PRESETS, default="mask_transformer", help="to fit (%(default)s)")
    presets = sorted({name for each in NETWORK_PRESETS.values() for name in each})
    parser.add_argument("--preset", choices=presets, default="cpu", help="recipe (%(default)s)")
    for entry in fields(TrainConfig):
        if entry.name in NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="instead of the preset's")
    for entry in fields(MaskTransformerTrainConfig):
        if entry.name in SAMPLE_NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="see MaskTransformerTrainConfig")
    for entry in fields(CascadeTrainConfig):
        if entry.name in CASCADE_NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="see CascadeTrainConfig")
    for name in SAMPLE_SWITCHES:
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, help="see MaskTransformerTrainConfig")
    for name, words in WORDS.items():
        recipe = {"precision": "TrainConfig", "inputs": "TrainConfig", "targets": "MaskTransformerTrainConfig"}.get(
            name, CascadeTrainConfig.__name__
        )
        parser.add_argument(flag(name), choices=get_args(words), help=f"instead of the preset's, see {recipe}")
    parser.add_argument("--backbone-weights", default="", metavar="FILE|URL", help="of a published ResNet-50")
    parser.add_argument("--start", type=Path, metavar="RUN|ARTIFACT", help="whose weights are the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--metrics", type=Path, metavar="PROM", help="file for the textfile collector of node_exporter")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.train import train
    from training.trainer.distributed import init_distributed

    torch.set_num_threads(options.threads)
    recipe, store = choose_recipe(options), PseudoLabelDataset(options.store)
    with init_distributed(options.device) as ranks:
        report = train(
            store, options.features or store.features, options.out, recipe, options.device,
            start=options.start, backbone=options.backbone_weights, limit_s=60.0 * options.minutes, ranks=ranks,
            metrics=options.metrics,
        )  # fmt: skip
        return asdict(report) if ranks.is_first else None


def choose_recipe(options: argparse.Namespace) -> MaskTransformerTrainConfig | CascadeTrainConfig:
    """The preset, and what was given instead."""
    names = (*NUMBERS, *WORDS, *SAMPLE_NUMBERS, *SAMPLE_SWITCHES, *CASCADE_NUMBERS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return make_train_config(options.network, options.preset, given)
