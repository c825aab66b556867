"""What commands share that hold something against labelled pictures."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.command import flag
from model.errors import ConfigError
from training.choices import CLASS_GROUPINGS, DATASET_FORMATS, MATCHING_METHODS

if TYPE_CHECKING:
    from training.evaluation.datasets.ground_truth import GroundTruthDataset
    from training.evaluation.matching.class_mapping import MatchingConfig
    from training.evaluation.predictors import Predictor


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The options of commands that hold something against labelled pictures."""
    parser.add_argument("source", type=Path, metavar="RUN|ARTIFACT|STORE")
    add_truth(parser)
    parser.add_argument("--method", choices=MATCHING_METHODS, help="clusters to categories (majority)")
    parser.add_argument(
        "--also", type=Path, metavar="SET", help="labelled pictures that help to name clusters and are not scored"
    )
    parser.add_argument(
        "--also-layout", choices=DATASET_FORMATS, default="instances", help="of that folder (%(default)s)"
    )
    parser.add_argument("--also-store", type=Path, metavar="STORE", help="of their labels, where the source is a store")
    for name in ("score", "iou", "stuff_iou"):
        parser.add_argument(
            flag(f"vote_{name}"),
            type=float,
            help="see VoteThresholds in training/evaluation/matching/cluster_matching.py",
        )


def add_truth(
    parser: argparse.ArgumentParser, *, default_split: str = "its validation split", is_required: bool = True
) -> None:
    """The options that say which labelled set is meant; for `read_truth`."""
    parser.add_argument("--truth", type=Path, required=is_required, metavar="SET", help="folder of labelled pictures")
    parser.add_argument("--layout", choices=DATASET_FORMATS, default="panoptic", help="of the folder (%(default)s)")
    parser.add_argument("--split", help=f"of a published set ({default_split})")
    parser.add_argument("--protocol", choices=CLASS_GROUPINGS, default="supercategories", help="classes (%(default)s)")


def read_truth(options: argparse.Namespace) -> "GroundTruthDataset":
    from training.evaluation.datasets.dataset_spec import DatasetSpec

    folder = options.truth.resolve()  # processes on other machines may have another working directory
    return DatasetSpec(folder=folder, layout=options.layout, split=options.split, protocol=options.protocol).read()


def plan_matching(options: argparse.Namespace) -> "MatchingConfig":
    from training.evaluation.matching.class_mapping import MatchingConfig
    from training.evaluation.matching.cluster_matching import VoteThresholds

    given = {name: getattr(options, f"vote_{name}") for name in ("score", "iou", "stuff_iou")}
    thresholds = VoteThresholds(**{name: value for name, value in given.items() if value is not None})
    return MatchingConfig(method=options.method or "majority", thresholds=thresholds)


def hear_witnesses(
    options: argparse.Namespace, source: "Predictor", truth: "GroundTruthDataset", plan: "MatchingConfig"
) -> "MatchingConfig":
    """The plan with what pictures say that help to name, if some were given; the source looks at them."""
    from training.evaluation.datasets.dataset_spec import DatasetSpec
    from training.evaluation.matching.auxiliary_set import count_auxiliary
    from training.evaluation.predictors import load_predictor

    if options.also is None:
        return plan
    witnesses = DatasetSpec(folder=options.also.resolve(), layout=options.also_layout).read()
    if options.also_store:
        own, source = source, load_predictor(options.also_store, threads=options.threads)
        if source.digest != own.digest:
            raise ConfigError(f"{options.also_store} has other clusters: label both sets with one codebook")
    return replace(plan, witnesses=count_auxiliary(source, witnesses, truth, plan.thresholds))
