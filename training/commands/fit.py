"""`useg-train fit`: pseudo-labels to a run."""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from model.command import flag
from training.fitting.recipe import PRESETS, FitConfig

RECIPE = ("steps", "batch", "learning_rate", "seed", "checkpoint_every")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="recipe (%(default)s)")
    for entry in fields(FitConfig):
        if entry.name in RECIPE:
            parser.add_argument(flag(entry.name), type=type(entry.default), help="instead of the preset's")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.fitting.fit import fit
    from training.labels.store import LabelStore

    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    store = LabelStore(options.store)
    report = fit(store, options.features or store.features, options.out, replace(PRESETS[options.preset], **given))
    return asdict(report)
