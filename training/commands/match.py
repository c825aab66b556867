"""`useg-train match`: labelled pictures to names for clusters."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.comparison import add_comparison, hear_witnesses, plan_matching, read_truth


def add_options(parser: argparse.ArgumentParser) -> None:
    add_comparison(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file of names to write")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.evaluate import fit_mapping
    from training.evaluation.predictors import load_predictor

    truth = read_truth(options)
    source = load_predictor(options.source, threads=options.threads)
    plan = hear_witnesses(options, source, truth, plan_matching(options))
    names = fit_mapping(source, truth, plan)
    names.write(options.out)
    matched = sum(found.category is not None for found in names.clusters.values())
    return {"names": str(options.out), "pictures": names.fitted_on.images, "clusters": len(names.clusters),
            "matched": matched, "method": names.method}  # fmt: skip
