"""`useg-train show`: pseudo-labels to a contact sheet."""

import argparse
from pathlib import Path
from typing import Any

from model.command import positive


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="JPG", help="picture to write")
    parser.add_argument("--count", type=positive, default=24, help="most photos on it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other photos (%(default)s)")
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from training.labels.contact_sheet import draw_sheet, write_sheet
    from training.labels.store import LabelStore

    store = LabelStore(options.store)
    write_sheet(draw_sheet(store, options.count, options.seed), options.out)
    return {"sheet": str(options.out), "photos": min(options.count, len(store.read_photos()))}
