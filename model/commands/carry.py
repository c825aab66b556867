"""`useg-model carry`: names of an artifact proposed for another, after a new training."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.carry import CarryRule, carry, count_agreement, keep_given, propose
from model.command import positive
from model.files import replace_file
from model.glossary import find_glossary, read_glossary
from model.panoptic import Segmentation
from model.release.segmenter import Segmenter, draw_photos, open_segmenter


def add_options(parser: argparse.ArgumentParser) -> None:
    rule = CarryRule()
    parser.add_argument("old", type=Path, metavar="OLD", help="artifact that has names, its own and those beside it")
    parser.add_argument("new", type=Path, metavar="NEW", help="artifact that needs them")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photos that both are asked about")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="JSON", help="names for `useg-model glossary import`"
    )
    parser.add_argument("--count", type=positive, default=200, help="most photos to look at (%(default)s)")
    parser.add_argument("--share", type=float, default=rule.share, help="see CarryRule in model/carry.py (%(default)s)")
    parser.add_argument("--margin", type=float, default=rule.margin, help="see CarryRule (%(default)s)")
    parser.add_argument("--pictures", type=positive, default=rule.pictures, help="see CarryRule (%(default)s)")
    parser.add_argument("--given", action="store_true", help="only names that people gave, not the contract's own")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    rule = CarryRule(share=options.share, margin=options.margin, pictures=options.pictures)
    old, new = (open_segmenter(folder, threads=options.threads) for folder in (options.old, options.new))
    glossary = read_glossary(find_glossary(options.old), old.contract)
    named = keep_given(old.contract, glossary) if options.given else glossary.apply(old.contract)
    agreement = count_agreement(_ask(old, new, options.photos, options.count), named, new.contract)
    proposals = propose(agreement, named, new.contract, rule)
    carried = carry(proposals, named, new.contract)
    with replace_file(options.out) as sibling:
        sibling.write_text(carried.render(), encoding="utf-8")
    known = {category.name for category in named.categories.values()}
    return {
        "names": str(options.out),
        "from": f"{named.name} {named.version}",
        "to": f"{new.contract.name} {new.contract.version}",
        "carried": len(carried.names),
        "lost": sorted(known - {name.category for name in carried.names.values()}),
        "clusters": [asdict(each) for each in proposals],
    }


def _ask(old: Segmenter, new: Segmenter, photos: Path, most: int) -> Iterator[tuple[Segmentation, Segmentation]]:
    for photo in draw_photos(photos, most):
        yield old.segment(photo.image), new.segment(photo.image)
