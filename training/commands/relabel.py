"""`useg-train relabel`: a round of self-training."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.command import flag


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="of a mask_transformer")
    parser.add_argument("store", type=Path, metavar="STORE", help="label store that it learned from")
    parser.add_argument("--out", type=Path, metavar="STORE", help="to fill or to finish; without, the run is measured")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    for name in ("share", "rise"):
        parser.add_argument(flag(name), type=float, help="see SelfTrainingConfig in training/self_training/rounds.py")
    parser.add_argument(
        "--zoom", action="store_true", help="look at windows with the encoder, too: finds what is small, 3 s a photo"
    )
    parser.add_argument("--force", action="store_true", help="label even if the run is less steady than its teacher")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.self_training.rounds import SelfTrainingConfig, relabel

    torch.set_num_threads(options.threads)
    store = PseudoLabelDataset(options.store)
    out = PseudoLabelDataset(options.out) if options.out else None
    given = {name: getattr(options, name) for name in ("share", "rise") if getattr(options, name) is not None}
    plan = SelfTrainingConfig(**given, zooms=options.zoom, is_forced=options.force)
    return asdict(relabel(options.run, store, options.features or store.features, out, plan))
