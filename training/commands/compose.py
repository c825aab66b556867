"""`useg-train compose`: a detector's masks, clustered by a store's codebook, over that store's stuff."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("detector", type=Path, metavar="RUN|ARTIFACT", help="what finds the masks; one class will do")
    parser.add_argument("store", type=Path, metavar="STORE", help="label store of the photos, for clusters and stuff")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="label store to make or to finish")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a mask that is drawn (%(default)s)")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.fitting.composition import compose
    from training.labels.store import LabelStore
    from training.scores.meetings.answers import open_source

    torch.set_num_threads(options.threads)
    detector = open_source(options.detector, threads=options.threads)
    store = LabelStore(options.store)
    return asdict(compose(detector, store, LabelStore(options.out), options.features or store.features, options.score))
