"""Options of the commands that use a labelled dataset, until `useg` takes them from `training.cli.evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.evaluation.datasets.ground_truth import GroundTruthDataset

_FORMATS = ("panoptic", "instances", "coco", "coco-instances", "coco-stuff", "cityscapes", "voc-masks", "voc-boxes",
            "uvo", "uvo-videos")  # fmt: skip


def add_truth(
    parser: argparse.ArgumentParser, *, default_split: str = "its validation split", is_required: bool = True
) -> None:
    """The options that select a labelled dataset; for `read_truth`."""
    parser.add_argument("--truth", type=Path, required=is_required, metavar="SET", help="folder of labelled images")
    parser.add_argument("--layout", choices=_FORMATS, default="panoptic", help="of the folder (%(default)s)")
    parser.add_argument("--split", help=f"of a published dataset ({default_split})")
    parser.add_argument(
        "--protocol", choices=("supercategories", "things-and-supercategories"), default="supercategories"
    )


def read_truth(options: argparse.Namespace) -> "GroundTruthDataset":
    from training.evaluation.datasets.dataset_spec import DatasetSpec

    spec = DatasetSpec(folder=options.truth, format=options.layout, split=options.split, classes=options.protocol)
    return spec.read()
