"""`useg-train`: labels out of photos, weights out of labels, scores out of weights."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from model.command import positive, run_command
from model.errors import ConfigError
from training.choices import LAYOUTS, MERGE_RULES, METHODS, PROPOSALS, PROTOCOLS, REFINEMENTS, TOKENS
from training.codebook_recipe import Background, Seeding, Things, Token
from training.recipe import PRESETS, FitConfig
from training.stego_recipe import STEGO_PRESETS

if TYPE_CHECKING:
    from training.naming import MatchPlan
    from training.truth import Truth

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
    _add_show(commands.add_parser("show", help="pseudo-labels to a contact sheet"))
    _add_match(commands.add_parser("match", help="labelled pictures to names for clusters"))
    _add_eval(commands.add_parser("eval", help="a run, an artifact or a store held against labelled pictures"))
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
    _add_discovery(parser)
    _add_clusters(parser)
    parser.set_defaults(work=_run_label)


def _add_discovery(parser: argparse.ArgumentParser) -> None:
    """What `label` may be told of masks beyond `--cuts` and `--threshold`."""
    for name, words in (("proposals", PROPOSALS), ("tokens", TOKENS), ("refinement", REFINEMENTS)):
        parser.add_argument(_flag(name), choices=words, help="see DiscoveryConfig in training/discovery_recipe.py")
    for name in ("centred", "faithful"):
        parser.add_argument(_flag(name), action="store_true", default=None, help="see DiscoveryConfig")
    parser.add_argument("--objects", type=positive, help="see DiscoveryConfig")


def _add_clusters(parser: argparse.ArgumentParser) -> None:
    """What `label` may be told of things and stuff beyond their numbers."""
    parser.add_argument("--codebook", type=Path, metavar="FILE", help="codebook.npz of another store, to use as it is")
    parser.add_argument("--stuff", metavar="kmeans|stego|FOLDER", help="source of stuff; one map a photo in a folder")
    parser.add_argument("--stego", choices=STEGO_PRESETS, help="published hyper-parameters (small)")
    parser.add_argument("--stego-steps", type=positive, help="instead of the preset's")
    parser.add_argument("--stuff-crf", action="store_true", default=None, help="a dense CRF on stuff (extra `crf`)")
    parser.add_argument("--merge", choices=MERGE_RULES, help="masks and stuff to one map, see training/store.py")
    parser.add_argument("--most-inside", type=float, help="see LabelConfig in training/store.py")
    for name, words in (("things", Things), ("crop_background", Background), ("crop_token", Token),
                        ("seeding", Seeding)):  # fmt: skip
        parser.add_argument(_flag(name), choices=get_args(words), help="see CodebookConfig")
    for name in ("crop_px", "crop_layer"):
        parser.add_argument(_flag(name), type=int, help="see CodebookConfig in training/codebook_recipe.py")
    parser.add_argument("--crop-normalised", action="store_true", default=None, help="compare crops by angle")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run to begin or to go on with")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="recipe (%(default)s)")
    for entry in fields(FitConfig):
        if entry.name in RECIPE:
            parser.add_argument(_flag(entry.name), type=type(entry.default), help="instead of the preset's")
    parser.set_defaults(work=_run_fit)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="JPG", help="picture to write")
    parser.add_argument("--count", type=positive, default=24, help="most photos on it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other photos (%(default)s)")
    parser.set_defaults(work=_run_show)


def _add_match(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file of names to write")
    parser.set_defaults(work=_run_match)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    parser.add_argument(
        "--names", type=Path, metavar="JSON", help="of `match`; else each half names the other's clusters"
    )
    parser.add_argument(
        "--same-set", action="store_true", help="allow scored photos to be those that names were fitted on"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="report.json and report.html")
    parser.set_defaults(work=_run_eval)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """The options of commands that hold something against labelled pictures."""
    parser.add_argument("source", type=Path, metavar="RUN|ARTIFACT|STORE")
    parser.add_argument("--truth", type=Path, required=True, metavar="SET", help="folder of labelled pictures")
    parser.add_argument("--layout", choices=LAYOUTS, default="panoptic", help="of the folder (%(default)s)")
    parser.add_argument("--split", help="of a published set (its validation split)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="supercategories", help="classes (%(default)s)")
    parser.add_argument("--method", choices=METHODS, help="clusters to categories (majority)")
    for name in ("score", "iou", "stuff_iou"):
        parser.add_argument(_flag(f"vote_{name}"), type=float, help="see VoteThresholds in training/matching.py")


def _run_label(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from threadpoolctl import threadpool_limits

    from model.checkpoints import DEFAULT_CACHE, fetch
    from model.files import hash_file
    from training.codebook import adopt, read_codebook
    from training.label import hash_photos, label_photos
    from training.photos import scan_photos
    from training.store import LabelConfig, LabelStore

    torch.set_num_threads(options.threads)
    if options.out.resolve().is_relative_to(options.photos.resolve()):
        raise ConfigError(f"{options.out} lies in {options.photos}: its labels would be taken for photos")
    encoder = fetch(options.encoder, DEFAULT_CACHE).resolve()
    book = read_codebook(options.codebook) if options.codebook else None
    given = {entry.name: getattr(options, entry.name, None) for entry in fields(LabelConfig)}
    given = {name: value for name, value in given.items() if value is not None and name != "codebook"}
    given |= _name_stuff(options) | {"encoder_hash": hash_file(encoder)}
    if book:
        given = adopt(book, given)
    config = LabelConfig(
        **given | {"photos": str(options.photos.resolve()), "encoder": str(encoder), "photos_hash": ""}
    )
    scan = scan_photos(options.photos, limit=options.limit)
    config = replace(config, photos_hash=hash_photos(scan.photos))
    store = LabelStore(options.out)
    with threadpool_limits(1, user_api="blas"):  # NumPy's BLAS threads and torch's fight for the cores, see LOG.md
        return asdict(label_photos(scan, config, store, options.features or store.features, book))


def _name_stuff(options: argparse.Namespace) -> dict[str, Any]:
    """`--stuff` and its steps in the words of LabelConfig; what was not given is left out."""
    named: dict[str, Any] = {}
    if options.stuff in ("kmeans", "stego"):
        named = {"stuff": options.stuff}
    elif options.stuff is not None:
        folder = Path(options.stuff).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--stuff takes kmeans, stego or a folder of maps; {options.stuff} is none of them")
        named = {"stuff": "maps", "maps": str(folder)}
    if options.stego and not options.stego_steps:
        named["stego_steps"] = STEGO_PRESETS[options.stego].steps
    return named


def _run_fit(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.fit import fit
    from training.store import LabelStore

    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    store = LabelStore(options.store)
    report = fit(store, options.features or store.features, options.out, replace(PRESETS[options.preset], **given))
    return asdict(report)


def _run_show(options: argparse.Namespace) -> dict[str, Any]:
    from training.contact_sheet import draw_sheet, write_sheet
    from training.store import LabelStore

    store = LabelStore(options.store)
    write_sheet(draw_sheet(store, options.count, options.seed), options.out)
    return {"sheet": str(options.out), "photos": min(options.count, len(store.read_photos()))}


def _run_match(options: argparse.Namespace) -> dict[str, Any]:
    from training.answers import open_source
    from training.evaluate import match_clusters

    truth = _read_truth(options)
    source = open_source(options.source, threads=options.threads)
    names = match_clusters(source, truth, _plan_matching(options))
    names.write(options.out)
    matched = sum(found.category is not None for found in names.clusters.values())
    return {"names": str(options.out), "pictures": names.fitted_on.pictures, "clusters": len(names.clusters),
            "matched": matched, "method": names.method}  # fmt: skip


def _run_eval(options: argparse.Namespace) -> dict[str, Any]:
    from training.answers import open_source
    from training.evaluate import evaluate
    from training.gallery import draw_gallery
    from training.names import read_names
    from training.page import write_page

    if options.names and options.method:
        raise ConfigError("--names were fitted with a method of their own: leave --method out")
    plan = replace(_plan_matching(options), is_same_set=options.same_set)
    if options.names:
        plan = replace(plan, names=read_names(options.names))
    truth = _read_truth(options)
    source = open_source(options.source, threads=options.threads)
    report, fit = evaluate(source, truth, plan)
    if options.out:
        report.write(options.out)
        write_page(report, draw_gallery(report.pictures, source, truth, fit), options.out)
    return asdict(report.summary)


def _read_truth(options: argparse.Namespace) -> "Truth":
    from training.layouts import TruthSet

    return TruthSet(folder=options.truth, layout=options.layout, split=options.split, protocol=options.protocol).read()


def _plan_matching(options: argparse.Namespace) -> "MatchPlan":
    from training.matching import VoteThresholds
    from training.naming import MatchPlan

    given = {name: getattr(options, f"vote_{name}") for name in ("score", "iou", "stuff_iou")}
    thresholds = VoteThresholds(**{name: value for name, value in given.items() if value is not None})
    return MatchPlan(method=options.method or "majority", thresholds=thresholds)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
