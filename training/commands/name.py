"""`useg-train name`: names for clusters from a few labelled regions, by how these look."""

import argparse
from pathlib import Path
from typing import Any

from model.command import positive
from training.choices import LAYOUTS, PROTOCOLS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="label store whose clusters the network learned")
    parser.add_argument("--truth", type=Path, required=True, metavar="SET", help="folder of labelled pictures")
    parser.add_argument("--layout", choices=LAYOUTS, default="panoptic", help="of the folder (%(default)s)")
    parser.add_argument("--split", help="of a published set (its validation split)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="supercategories", help="classes (%(default)s)")
    parser.add_argument("--regions", type=positive, default=50, help="labelled regions to look at (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other regions (%(default)s)")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file of names to write")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.labels.store import LabelStore
    from training.scores.layouts import TruthSet
    from training.scores.prototypes import name_by_regions

    torch.set_num_threads(options.threads)
    truth = TruthSet(folder=options.truth, layout=options.layout, split=options.split, protocol=options.protocol).read()
    store = LabelStore(options.store)
    names = name_by_regions(store, truth, options.regions, options.seed, options.features or store.features)
    names.write(options.out)
    named = sum(found.category is not None for found in names.clusters.values())
    return {"names": str(options.out), "pictures": names.fitted_on.pictures, "clusters": len(names.clusters),
            "matched": named, "method": names.method}  # fmt: skip
