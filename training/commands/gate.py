"""`useg-train gate`: may a new version take the place of an old one? Exit status 4 with the reasons if not."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.command import REFUSED, flag, positive
from model.errors import ConfigError
from model.files import atomic_write
from training.commands.comparison import add_truth, read_truth

if TYPE_CHECKING:
    from model.export.predictor import ArtifactPredictor
    from model.postprocessing.panoptic import Segmentation

RULES = ("margin", "agreement", "segments", "void", "drift")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", type=Path, metavar="NEW", help="artifact to examine")
    parser.add_argument("old", type=Path, metavar="OLD", help="artifact that it is to replace")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos to compare answers on, without --truth")
    parser.add_argument("--count", type=positive, default=200, help="most of them to look at (%(default)s)")
    add_truth(parser, is_required=False)
    for name in RULES:
        parser.add_argument(
            flag(name), type=float, help="see PromotionThresholds in training/evaluation/promotion_gate.py"
        )
    parser.add_argument("--out", type=Path, metavar="JSON", help="the result, also if it is a refusal")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from model.export.predictor import load_artifact_predictor
    from training.evaluation.predictors import load_predictor
    from training.evaluation.promotion_gate import PromotionThresholds, check_scores, check_similarity

    if not options.truth and not options.photos:
        raise ConfigError("nothing to compare on: give --truth a labelled set, or --photos a folder")
    known = {entry.name for entry in fields(PromotionThresholds)}
    given = {name: getattr(options, name) for name in known if getattr(options, name) is not None}
    rule = PromotionThresholds(**given)
    if options.truth:
        truth = read_truth(options)
        new, old = (load_predictor(folder, threads=options.threads) for folder in (options.new, options.old))
        checks = check_scores(new, old, truth, rule)
    else:
        later, earlier = (
            load_artifact_predictor(folder, threads=options.threads) for folder in (options.new, options.old)
        )
        answers = _ask(earlier, later, options.photos, options.count)
        checks = check_similarity(answers, later.contract, rule)
    reasons = [check.reason for check in checks if not check.is_passed]
    result = {"passed": not reasons, "checks": [asdict(check) for check in checks], REFUSED: reasons}
    if options.out:
        with atomic_write(options.out) as sibling:
            sibling.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _ask(
    old: "ArtifactPredictor", new: "ArtifactPredictor", folder: Path, most: int
) -> "Iterator[tuple[Segmentation, Segmentation]]":
    from model.export.predictor import sample_photos

    for photo in sample_photos(folder, most, seed=1):  # a version's reference is drawn with seed 0
        yield old.segment(photo.image), new.segment(photo.image)
