"""`useg-train recluster`: other thing clusters for a run, without a fit."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.command import positive


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="fitted with --embeds")
    parser.add_argument("store", type=Path, metavar="STORE", help="label store whose photos make the clusters")
    parser.add_argument("--clusters", type=positive, required=True, help="thing clusters of the new run")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to write")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--score", type=float, default=0.35, help="least score of detections looked at (%(default)s)")
    parser.add_argument("--limit", type=positive, help="at most this many photos, evenly spread")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (%(default)s)")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.mask_transformer.recluster import ReclusterConfig, recluster

    torch.set_num_threads(options.threads)
    plan = ReclusterConfig(clusters=options.clusters, score=options.score, limit=options.limit, seed=options.seed)
    store = PseudoLabelDataset(options.store)
    return asdict(recluster(options.run, store, options.features or store.features, options.out, plan))
