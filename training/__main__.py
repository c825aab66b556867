"""`useg-train`: labels out of photos, weights out of labels, scores out of weights."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from model.command import positive, run_command
from model.errors import ConfigError
from training.recipe import PRESETS, FitConfig

RECIPE = ("steps", "batch", "learning_rate", "seed", "checkpoint_every")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as `model.command.run_command` gives it."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells at length how it was loaded
    return run_command(build_parser(), arguments, "`label` and `fit` go on where they were when given again")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="useg-train", description=__doc__)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_label(commands.add_parser("label", help="photos to panoptic pseudo-labels"))
    _add_fit(commands.add_parser("fit", help="pseudo-labels to a run"))
    _add_eval(commands.add_parser("eval", help="an artifact held against labelled pictures"))
    return parser


def _add_label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of unlabelled photos")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="label store to make or to finish")
    parser.add_argument("--encoder", required=True, metavar="FILE|URL", help="DINO or DINOv2 weights")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--limit", type=positive, help="at most this many photos, evenly spread")
    parser.add_argument("--note", default="", help="where the photos come from, for the model card")
    for name, kind in (("side_px", positive), ("cuts", positive), ("threshold", float), ("components", positive),
                       ("thing_clusters", positive), ("stuff_clusters", positive), ("seed", int)):  # fmt: skip
        parser.add_argument(_flag(name), type=kind, help="see LabelConfig in training/store.py")
    parser.set_defaults(work=_run_label)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="recipe (%(default)s)")
    for entry in fields(FitConfig):
        if entry.name in RECIPE:
            parser.add_argument(_flag(entry.name), type=type(entry.default), help="instead of the preset's")
    parser.set_defaults(work=_run_fit)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--truth", type=Path, required=True, metavar="SET", help="folder in COCO's panoptic format")
    parser.set_defaults(work=_run_eval)


def _run_label(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from threadpoolctl import threadpool_limits

    from model.checkpoints import DEFAULT_CACHE, fetch
    from model.files import hash_file
    from training.label import hash_photos, label_photos
    from training.photos import scan_photos
    from training.store import LabelConfig, LabelStore

    torch.set_num_threads(options.threads)
    if options.out.resolve().is_relative_to(options.photos.resolve()):
        raise ConfigError(f"{options.out} lies in {options.photos}: its labels would be taken for photos")
    encoder = fetch(options.encoder, DEFAULT_CACHE).resolve()
    given = {entry.name: getattr(options, entry.name, None) for entry in fields(LabelConfig)}
    config = LabelConfig(
        **{name: value for name, value in given.items() if value is not None}
        | {"photos": str(options.photos.resolve()), "encoder": str(encoder)}
        | {"photos_hash": "", "encoder_hash": hash_file(encoder)}
    )
    scan = scan_photos(options.photos, limit=options.limit)
    config = replace(config, photos_hash=hash_photos(scan.photos))
    store = LabelStore(options.out)
    with threadpool_limits(1, user_api="blas"):  # NumPy's BLAS threads and torch's fight for the cores, see LOG.md
        return asdict(label_photos(scan, config, store, options.features or store.features))


def _run_fit(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.fit import fit
    from training.store import LabelStore

    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    store = LabelStore(options.store)
    report = fit(store, options.features or store.features, options.out, replace(PRESETS[options.preset], **given))
    return asdict(report)


def _run_eval(options: argparse.Namespace) -> dict[str, Any]:
    from training.evaluate import evaluate

    return asdict(evaluate(options.artifact, options.truth, threads=options.threads))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
