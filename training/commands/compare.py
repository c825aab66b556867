"""`useg-train compare`: two runs, artifacts or stores on the same labelled pictures, in a paired bootstrap."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.commands.comparison import add_comparison, hear_witnesses, plan_matching, read_truth


def add_options(parser: argparse.ArgumentParser) -> None:
    add_comparison(parser)
    parser.add_argument(
        "--with", dest="other", type=Path, required=True, metavar="RUN|ARTIFACT|STORE", help="the other"
    )
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.matching.class_mapping import MatchingConfig
    from training.evaluation.paired_comparison import compare_predictors
    from training.evaluation.predictors import Predictor, load_predictor

    truth, plan = read_truth(options), plan_matching(options)

    def prepare(folder: Path) -> tuple[Predictor, MatchingConfig]:
        source = load_predictor(folder, threads=options.threads)
        return source, hear_witnesses(options, source, truth, plan)

    new, old = prepare(options.source), prepare(options.other)
    differences = compare_predictors(new, old, truth)
    return {
        "new": new[0].title,
        "old": old[0].title,
        "truth": truth.name,
        "pictures": len(truth.images),
        "figures": {name: asdict(found) for name, found in differences.items()},
    }
