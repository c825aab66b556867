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
    from model.export.predictor import load_artifact_predictor, sample_photos
    from training.data.dataset import PseudoLabelDataset
    from training.pseudo_labels.visualize import plot_dataset, plot_predictions, save_jpeg

    if (options.source / CONTRACT_FILE).is_file():
        if not options.photos:
            raise ConfigError(f"{options.source} is an artifact: say with --photos what it is to answer")
        segmenter = load_artifact_predictor(options.source, threads=options.threads)
        title = f"{segmenter.contract.name} {segmenter.contract.version}"
        drawn = list(sample_photos(options.photos, options.count, options.seed))
        save_jpeg(plot_predictions(title, drawn, segmenter), options.out)
        return {"sheet": str(options.out), "photos": len(drawn)}
    store = PseudoLabelDataset(options.source)
    save_jpeg(plot_dataset(store, options.count, options.seed), options.out)
    return {"sheet": str(options.out), "photos": min(options.count, len(store.read_photos()))}
