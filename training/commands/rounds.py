"""`useg-train rounds`: how good each round of self-training was."""

import argparse
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON", help="of `eval` or `relabel`, a round each")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rounds.csv and rounds.png")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.self_training.rounds import PICTURE_FILE, plot_rounds

    return {"rounds": plot_rounds(options.results, options.out), "picture": str(options.out / PICTURE_FILE)}
