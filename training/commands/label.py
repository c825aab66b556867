"""`useg-train label`: photos to panoptic pseudo-labels."""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from model.command import flag, positive
from model.errors import ConfigError
from training.choices import MASKCUT_FEATURES, PROPOSAL_METHODS, REFINEMENT_METHODS, STUFF_MERGE_RULES
from training.commands.engine import add_engine, open_engine
from training.data.label_config import STEGO_PRESETS, CropBackground, CropToken, KmeansInit, ThingEmbedding


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of unlabelled photos")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="label store to make or to finish")
    parser.add_argument("--encoder", required=True, metavar="FILE|URL", help="DINO or DINOv2 weights")
    parser.add_argument("--features", type=Path, metavar="DIR", help="feature cache (STORE/features)")
    parser.add_argument("--limit", type=positive, help="at most this many photos, evenly spread")
    add_engine(parser)
    parser.add_argument("--note", default="", help="where the photos come from, for the model card")
    for name, kind in (("side_px", positive), ("maskcut_n", positive), ("threshold", float), ("pca_dim", positive),
                       ("thing_clusters", positive), ("stuff_clusters", positive), ("seed", int)):  # fmt: skip
        parser.add_argument(flag(name), type=kind, help="see PseudoLabelConfig in training/data/dataset.py")
    _add_discovery(parser)
    _add_clusters(parser)
    parser.set_defaults(work=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from threadpoolctl import threadpool_limits

    from model.checkpoints.state_dicts import DEFAULT_CACHE, fetch_file
    from model.files import hash_file
    from training.data.dataset import PseudoLabelConfig, PseudoLabelDataset
    from training.data.executors import parse_shard
    from training.data.photos import scan_photos
    from training.pseudo_labels.codebook import load_codebook, merge_options
    from training.pseudo_labels.pipeline import hash_photos, label_photos

    torch.set_num_threads(options.threads)
    part = parse_shard(options.shard)
    if options.out.resolve().is_relative_to(options.photos.resolve()):
        raise ConfigError(f"{options.out} lies in {options.photos}: its labels would be taken for photos")
    encoder = fetch_file(options.encoder, DEFAULT_CACHE).resolve()
    book = load_codebook(options.codebook) if options.codebook else None
    given = {entry.name: getattr(options, entry.name, None) for entry in fields(PseudoLabelConfig)}
    given = {name: value for name, value in given.items() if value is not None and name != "codebook"}
    given |= _name_stuff(options) | {"encoder_hash": hash_file(encoder)}
    if book:
        given = merge_options(book, given)
    config = PseudoLabelConfig(
        **given | {"photos": str(options.photos.resolve()), "encoder": str(encoder), "photos_hash": ""}
    )
    store = PseudoLabelDataset(options.out.resolve())
    scan = scan_photos(options.photos, limit=options.limit, memo=store.scan)
    config = replace(config, photos_hash=hash_photos(scan.photos))
    features = options.features or store.features
    engine = open_engine(options)
    with threadpool_limits(
        1, user_api="blas"
    ):  # NumPy's BLAS threads and torch's fight for the cores, see docs/experiments
        return asdict(label_photos(scan, config, store, features.resolve(), book, engine=engine, part=part))


def _add_discovery(parser: argparse.ArgumentParser) -> None:
    """What `label` may be told of masks beyond `--maskcut_n` and `--threshold`."""
    for name, words in (
        ("proposals", PROPOSAL_METHODS[:2]),
        ("tokens", MASKCUT_FEATURES),
        ("refinement", REFINEMENT_METHODS),
    ):
        parser.add_argument(flag(name), choices=words, help="see MaskDiscoveryConfig in training/data/label_config.py")
    for name in ("maskcut_subtract_mean", "maskcut_reference_filters"):
        parser.add_argument(flag(name), action="store_true", default=None, help="see MaskDiscoveryConfig")
    parser.add_argument("--objects", type=positive, help="see MaskDiscoveryConfig")


def _add_clusters(parser: argparse.ArgumentParser) -> None:
    """What `label` may be told of things and stuff beyond their numbers."""
    parser.add_argument("--codebook", type=Path, metavar="FILE", help="codebook.npz of another store, to use as it is")
    parser.add_argument("--stuff", metavar="kmeans|regions|stego|FOLDER", help="source of stuff, or its maps")
    parser.add_argument("--stego", choices=STEGO_PRESETS, help="published hyper-parameters (small)")
    parser.add_argument("--stego-steps", type=positive, help="instead of the preset's")
    parser.add_argument("--stuff-crf", action="store_true", default=None, help="a dense CRF on stuff (extra `crf`)")
    parser.add_argument(
        "--merge", choices=STUFF_MERGE_RULES, help="masks and stuff to one map, see training/data/dataset.py"
    )
    parser.add_argument("--max-stuff-in-things", type=float, help="see PseudoLabelConfig in training/data/dataset.py")
    for name, words in (("things", ThingEmbedding), ("crop_background", CropBackground), ("crop_token", CropToken),
                        ("kmeans_init", KmeansInit)):  # fmt: skip
        parser.add_argument(flag(name), choices=get_args(words), help="see CodebookConfig")
    for name in ("crop_px", "crop_layer"):
        parser.add_argument(flag(name), type=int, help="see CodebookConfig in training/data/label_config.py")
    parser.add_argument("--crop-normalised", action="store_true", default=None, help="compare crops by angle")


def _name_stuff(options: argparse.Namespace) -> dict[str, Any]:
    """`--stuff` and its steps in the words of PseudoLabelConfig; what was not given is left out."""
    named: dict[str, Any] = {}
    if options.stuff in ("kmeans", "regions", "stego"):
        named = {"stuff": options.stuff}
    elif options.stuff is not None:
        folder = Path(options.stuff).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--stuff takes kmeans, regions, stego or a folder of maps, not {options.stuff}")
        named = {"stuff": "maps", "maps": str(folder)}
    if options.stego and not options.stego_steps:
        named["stego_steps"] = STEGO_PRESETS[options.stego].steps
    return named
