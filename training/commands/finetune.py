"""`useg-train finetune`: a run taught the categories of a labelled set by a share of its pictures."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.command import flag, positive
from training.commands.comparison import add_truth, read_truth
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.presets import finetune_config


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", type=Path, metavar="RUN|ARTIFACT", help="whose weights are the first")
    parser.add_argument("--encoder", metavar="FILE|URL", help="that an artifact was made with; a run has its own")
    add_truth(parser, default_split="its validation split: give the training split")
    parser.add_argument("--fraction", type=float, required=True, help="share of the set to learn from, 0.01 for 1 %%")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (RUN/annotations/features)")
    parser.add_argument(
        "--preset", choices=sorted(MASK_TRANSFORMER_PRESETS), default="cpu", help="recipe (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, help="instead of the published number for this share")
    for name, kind in (("batch", positive), ("learning_rate", float), ("seed", int)):
        parser.add_argument(flag(name), type=kind, help="instead of the preset's")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from model.checkpoints.state_dicts import DEFAULT_CACHE, fetch_file
    from training.finetune import finetune

    torch.set_num_threads(options.threads)
    truth = read_truth(options)
    given = {name: getattr(options, name) for name in ("steps", "batch", "learning_rate", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(finetune_config(options.fraction, MASK_TRANSFORMER_PRESETS[options.preset]), **given)
    encoder = fetch_file(options.encoder, DEFAULT_CACHE) if options.encoder else None
    return asdict(finetune(options.start, truth, options.fraction, options.out, recipe, options.features, encoder))
