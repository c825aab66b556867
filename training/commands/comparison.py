"""What commands share that hold something against labelled pictures."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.command import flag
from model.errors import ConfigError
from training.choices import LAYOUTS, METHODS, PROTOCOLS

if TYPE_CHECKING:
    from training.scores.meetings.answers import Source
    from training.scores.naming.naming import MatchPlan
    from training.scores.sets.truth import Truth


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The options of commands that hold something against labelled pictures."""
    parser.add_argument("source", type=Path, metavar="RUN|ARTIFACT|STORE")
    add_truth(parser)
    parser.add_argument("--method", choices=METHODS, help="clusters to categories (majority)")
    parser.add_argument(
        "--also", type=Path, metavar="SET", help="labelled pictures that help to name clusters and are not scored"
    )
    parser.add_argument("--also-layout", choices=LAYOUTS, default="instances", help="of that folder (%(default)s)")
    parser.add_argument("--also-store", type=Path, metavar="STORE", help="of their labels, where the source is a store")
    for name in ("score", "iou", "stuff_iou"):
        parser.add_argument(
            flag(f"vote_{name}"), type=float, help="see VoteThresholds in training/scores/meetings/matching.py"
        )


def add_truth(
    parser: argparse.ArgumentParser, *, default_split: str = "its validation split", is_required: bool = True
) -> None:
    """The options that say which labelled set is meant; for `read_truth`."""
    parser.add_argument("--truth", type=Path, required=is_required, metavar="SET", help="folder of labelled pictures")
    parser.add_argument("--layout", choices=LAYOUTS, default="panoptic", help="of the folder (%(default)s)")
    parser.add_argument("--split", help=f"of a published set ({default_split})")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="supercategories", help="classes (%(default)s)")


def read_truth(options: argparse.Namespace) -> "Truth":
    from training.scores.sets.layouts import TruthSet

    folder = options.truth.resolve()  # processes on other machines may have another working directory
    return TruthSet(folder=folder, layout=options.layout, split=options.split, protocol=options.protocol).read()


def plan_matching(options: argparse.Namespace) -> "MatchPlan":
    from training.scores.meetings.matching import VoteThresholds
    from training.scores.naming.naming import MatchPlan

    given = {name: getattr(options, f"vote_{name}") for name in ("score", "iou", "stuff_iou")}
    thresholds = VoteThresholds(**{name: value for name, value in given.items() if value is not None})
    return MatchPlan(method=options.method or "majority", thresholds=thresholds)


def hear_witnesses(options: argparse.Namespace, source: "Source", truth: "Truth", plan: "MatchPlan") -> "MatchPlan":
    """The plan with what pictures say that help to name, if some were given; the source looks at them."""
    from training.scores.meetings.answers import open_source
    from training.scores.naming.witnesses import hear
    from training.scores.sets.layouts import TruthSet

    if options.also is None:
        return plan
    witnesses = TruthSet(folder=options.also.resolve(), layout=options.also_layout).read()
    if options.also_store:
        own, source = source, open_source(options.also_store, threads=options.threads)
        if source.digest != own.digest:
            raise ConfigError(f"{options.also_store} has other clusters: label both sets with one codebook")
    return replace(plan, witnesses=hear(source, witnesses, truth, plan.thresholds))
