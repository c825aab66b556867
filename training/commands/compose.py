"""`useg-train build_detector_labels`: a detector's masks, clustered by a store's codebook, over that store's stuff."""

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

    from training.data.dataset import PseudoLabelDataset
    from training.detector_labels import build_detector_labels
    from training.evaluation.predictors import load_predictor

    torch.set_num_threads(options.threads)
    detector = load_predictor(options.detector, threads=options.threads)
    store = PseudoLabelDataset(options.store)
    return asdict(
        build_detector_labels(
            detector, store, PseudoLabelDataset(options.out), options.features or store.features, options.score
        )
    )
