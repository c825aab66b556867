"""`useg-train`: labels out of photos, weights out of labels, scores out of weights."""

import argparse
import logging
import sys
from collections.abc import Sequence

from model.command import positive, run_command
from training.commands import (
    compose,
    finetune,
    fit,
    recluster,
    relabel,
    rounds,
)

COMMANDS = {
    "fit": ("pseudo-labels to a run", fit),
    "finetune": ("a run taught by some pictures of a labelled set", finetune),
    "relabel": ("pseudo-labels that a run finds in the photos it learned from", relabel),
    "rounds": ("scores of each round of self-training to a picture", rounds),
    "recluster": ("other thing clusters for a run, without a fit", recluster),
    "compose": ("a detector's masks over a store's stuff: the paper's baselines", compose),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as `model.command.run_command` gives it."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells at length how it was loaded
    return run_command(build_parser(), arguments, "`fit` goes on where they were when given again")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="useg-train", description=__doc__)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for word, (words, command) in COMMANDS.items():
        command.add_options(commands.add_parser(word, help=words))
    return parser


if __name__ == "__main__":
    sys.exit(main())
