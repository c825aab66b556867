"""`useg-train fit`: pseudo-labels to a run."""

import argparse
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from model.command import flag
from training.fitting.cascade.recipe import Backbone, CascadeRecipe, Pasting
from training.fitting.loop.recipe import Inputs, Precision, Recipe
from training.fitting.presets import PRESETS_OF, plan_recipe
from training.fitting.transformer.recipe import FitConfig, Targets

NUMBERS = ("steps", "batch", "learning_rate", "average_decay", "seed", "checkpoint_every")
WORDS = {"precision": Precision, "backbone": Backbone, "inputs": Inputs, "targets": Targets, "pasting": Pasting}
SAMPLE_NUMBERS = ("queries", "paste_rate", "crop_rate", "most_targets", "doubt", "jitter")
SAMPLE_SWITCHES = ("pastes_alike", "drops_unknown", "embeds")
"""Of the mask transformer's recipe."""
CASCADE_NUMBERS = ("drop_iou", "ignored_share")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--network", choices=PRESETS_OF, default="mask_transformer", help="to fit (%(default)s)")
    presets = sorted({name for each in PRESETS_OF.values() for name in each})
    parser.add_argument("--preset", choices=presets, default="cpu", help="recipe (%(default)s)")
    for entry in fields(Recipe):
        if entry.name in NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="instead of the preset's")
    for entry in fields(FitConfig):
        if entry.name in SAMPLE_NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="see FitConfig")
    for entry in fields(CascadeRecipe):
        if entry.name in CASCADE_NUMBERS:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="see CascadeRecipe")
    for name in SAMPLE_SWITCHES:
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, help="see FitConfig")
    for name, words in WORDS.items():
        recipe = {"precision": "Recipe", "inputs": "Recipe", "targets": "FitConfig"}.get(name, CascadeRecipe.__name__)
        parser.add_argument(flag(name), choices=get_args(words), help=f"instead of the preset's, see {recipe}")
    parser.add_argument("--backbone-weights", default="", metavar="FILE|URL", help="of a published ResNet-50")
    parser.add_argument("--start", type=Path, metavar="RUN|ARTIFACT", help="whose weights are the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--metrics", type=Path, metavar="PROM", help="file for the textfile collector of node_exporter")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from training.fitting.fit import fit
    from training.fitting.loop.ranks import join_ranks
    from training.labels.store import LabelStore

    torch.set_num_threads(options.threads)
    recipe, store = choose_recipe(options), LabelStore(options.store)
    with join_ranks(options.device) as ranks:
        report = fit(
            store, options.features or store.features, options.out, recipe, options.device,
            start=options.start, backbone=options.backbone_weights, limit_s=60.0 * options.minutes, ranks=ranks,
            metrics=options.metrics,
        )  # fmt: skip
        return asdict(report) if ranks.is_first else None


def choose_recipe(options: argparse.Namespace) -> FitConfig | CascadeRecipe:
    """The preset, and what was given instead."""
    names = (*NUMBERS, *WORDS, *SAMPLE_NUMBERS, *SAMPLE_SWITCHES, *CASCADE_NUMBERS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return plan_recipe(options.network, options.preset, given)
