"""`useg-train eval`: a run, an artifact or a store held against labelled pictures."""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ConfigError
from training.commands.comparison import add_comparison, hear_witnesses, plan_matching, read_truth
from training.commands.engine import add_engine, open_engine

if TYPE_CHECKING:
    from training.evaluation.matching.class_mapping import MatchingConfig

COMPARISONS_FOLDER = "comparisons"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_comparison(parser)
    parser.add_argument(
        "--names", type=Path, metavar="JSON", help="of `match`; else each half names the other's clusters"
    )
    parser.add_argument(
        "--same-set", action="store_true", help="allow scored photos to be those that names were fitted on"
    )
    add_engine(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="report.json and report.html")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.data.executors import ALL_SHARDS, parse_shard
    from training.evaluation.evaluate import EvaluationWorker, check_matching, compute_report, evaluate_images
    from training.evaluation.gallery import render_gallery
    from training.evaluation.html_report import write_html_report

    part = parse_shard(options.shard)
    if not options.out and (part != ALL_SHARDS or options.engine == "ray"):
        raise ConfigError("parts of a set, and Ray's workers, leave what they find in a folder: give --out")
    plan, truth = _plan(options), read_truth(options)
    with _hold(options.out) as folder:
        examiner = EvaluationWorker(
            source=options.source.resolve(), threads=options.threads, truth=replace(truth, images=()), folder=folder
        )
        check_matching(examiner.opened, truth, plan)
        if part == ALL_SHARDS:
            plan = hear_witnesses(options, examiner.opened, truth, plan)
        comparisons = evaluate_images(examiner, truth.images, open_engine(options), part)
        if part != ALL_SHARDS:
            return {"part": str(part), "pictures": len(comparisons)}
        report, fit = compute_report(comparisons, examiner.opened, truth, plan)
        if options.out:
            report.write(options.out)
            write_html_report(report, render_gallery(report.images, examiner.opened, truth, fit), options.out)
            shutil.rmtree(folder)
        return asdict(report.summary)


def _plan(options: argparse.Namespace) -> "MatchingConfig":
    from training.evaluation.matching.mapping_file import read_mapping

    if options.names and options.method:
        raise ConfigError("--names were fitted with a method of their own: leave --method out")
    if options.names and options.also:
        raise ConfigError("--names are fitted: give --also to `useg-train match`")
    plan = replace(plan_matching(options), is_same_set=options.same_set)
    return replace(plan, names=read_mapping(options.names)) if options.names else plan


@contextmanager
def _hold(out: Path | None) -> Iterator[Path]:
    """Where comparisons stay until they are scored: in `out`, if a killed run is to go on."""
    if out:
        yield (out / COMPARISONS_FOLDER).resolve()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
