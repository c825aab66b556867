"""`useg-train show`: pseudo-labels, or what an artifact answers, to a contact sheet."""

import argparse
from pathlib import Path
from typing import Any

from model.command import positive
from model.contract import CONTRACT_FILE
from model.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="STORE|ARTIFACT")
    parser.add_argument("--out", type=Path, required=True, metavar="JPG", help="picture to write")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos for an artifact; a store has its own")
    parser.add_argument("--count", type=positive, default=24, help="most photos on it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other photos (%(default)s)")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from model.release.segmenter import draw_photos, open_segmenter
    from training.labels.contact_sheet import draw_answers, draw_sheet, write_sheet
    from training.labels.store import LabelStore

    if (options.source / CONTRACT_FILE).is_file():
        if not options.photos:
            raise ConfigError(f"{options.source} is an artifact: say with --photos what it is to answer")
        segmenter = open_segmenter(options.source, threads=options.threads)
        title = f"{segmenter.contract.name} {segmenter.contract.version}"
        drawn = list(draw_photos(options.photos, options.count, options.seed))
        write_sheet(draw_answers(title, drawn, segmenter), options.out)
        return {"sheet": str(options.out), "photos": len(drawn)}
    store = LabelStore(options.source)
    write_sheet(draw_sheet(store, options.count, options.seed), options.out)
    return {"sheet": str(options.out), "photos": min(options.count, len(store.read_photos()))}
