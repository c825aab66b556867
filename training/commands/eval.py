"""`useg-train eval`: a run, an artifact or a store held against labelled pictures."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from training.commands.comparison import add_comparison, plan_matching, read_truth


def add_options(parser: argparse.ArgumentParser) -> None:
    add_comparison(parser)
    parser.add_argument(
        "--names", type=Path, metavar="JSON", help="of `match`; else each half names the other's clusters"
    )
    parser.add_argument(
        "--same-set", action="store_true", help="allow scored photos to be those that names were fitted on"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="report.json and report.html")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.scores.answers import open_source
    from training.scores.evaluate import evaluate
    from training.scores.gallery import draw_gallery
    from training.scores.names import read_names
    from training.scores.page import write_page

    if options.names and options.method:
        raise ConfigError("--names were fitted with a method of their own: leave --method out")
    plan = replace(plan_matching(options), is_same_set=options.same_set)
    if options.names:
        plan = replace(plan, names=read_names(options.names))
    truth = read_truth(options)
    source = open_source(options.source, threads=options.threads)
    report, fit = evaluate(source, truth, plan)
    if options.out:
        report.write(options.out)
        write_page(report, draw_gallery(report.pictures, source, truth, fit), options.out)
    return asdict(report.summary)
