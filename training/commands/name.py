"""`useg-train name`: names for clusters from a few labelled regions, by how these look."""

import argparse
from pathlib import Path
from typing import Any

from model.command import positive
from training.commands.comparison import add_truth, read_truth


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="label store whose clusters the network learned")
    add_truth(parser)
    parser.add_argument("--regions", type=positive, default=50, help="labelled regions to look at (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other regions (%(default)s)")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file of names to write")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.evaluation.matching.prototypes import match_by_regions

    torch.set_num_threads(options.threads)
    truth = read_truth(options)
    store = PseudoLabelDataset(options.store)
    names = match_by_regions(store, truth, options.regions, options.seed, options.features or store.features)
    names.write(options.out)
    named = sum(found.category is not None for found in names.clusters.values())
    return {"names": str(options.out), "pictures": names.fitted_on.images, "clusters": len(names.clusters),
            "matched": named, "method": names.method}  # fmt: skip
