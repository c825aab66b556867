"""`useg-model transfer_names`: names of an artifact proposed for another, after a new training."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.command import positive
from model.export.predictor import ArtifactPredictor, load_artifact_predictor, sample_photos
from model.files import atomic_write
from model.postprocessing.panoptic import Segmentation
from model.registry.category_names import names_path, read_names
from model.registry.name_transfer import (
    TransferThresholds,
    count_overlap,
    keep_user_names,
    propose_names,
    transfer_names,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    rule = TransferThresholds()
    parser.add_argument("old", type=Path, metavar="OLD", help="artifact that has names, its own and those beside it")
    parser.add_argument("new", type=Path, metavar="NEW", help="artifact that needs them")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photos that both are asked about")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="JSON", help="names for `useg-model glossary import`"
    )
    parser.add_argument("--count", type=positive, default=200, help="most photos to look at (%(default)s)")
    parser.add_argument(
        "--share",
        type=float,
        default=rule.share,
        help="see TransferThresholds in model/registry/name_transfer.py (%(default)s)",
    )
    parser.add_argument("--margin", type=float, default=rule.margin, help="see TransferThresholds (%(default)s)")
    parser.add_argument("--pictures", type=positive, default=rule.pictures, help="see TransferThresholds (%(default)s)")
    parser.add_argument("--given", action="store_true", help="only names that people gave, not the contract's own")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    rule = TransferThresholds(share=options.share, margin=options.margin, pictures=options.pictures)
    old, new = (load_artifact_predictor(folder, threads=options.threads) for folder in (options.old, options.new))
    glossary = read_names(names_path(options.old), old.contract)
    named = keep_user_names(old.contract, glossary) if options.given else glossary.apply(old.contract)
    agreement = count_overlap(_ask(old, new, options.photos, options.count), named, new.contract)
    proposals = propose_names(agreement, named, new.contract, rule)
    carried = transfer_names(proposals, named, new.contract)
    with atomic_write(options.out) as sibling:
        sibling.write_text(carried.to_json(), encoding="utf-8")
    known = {category.name for category in named.categories.values()}
    return {
        "names": str(options.out),
        "from": f"{named.name} {named.version}",
        "to": f"{new.contract.name} {new.contract.version}",
        "carried": len(carried.names),
        "lost": sorted(known - {name.category for name in carried.names.values()}),
        "clusters": [asdict(each) for each in proposals],
    }


def _ask(
    old: ArtifactPredictor, new: ArtifactPredictor, photos: Path, most: int
) -> Iterator[tuple[Segmentation, Segmentation]]:
    for photo in sample_photos(photos, most):
        yield old.segment(photo.image), new.segment(photo.image)
