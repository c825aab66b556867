"""`useg-model`: runs to artifacts, artifacts checked, photos segmented."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from model.command import positive, run_command
from model.contract import TASKS, Thresholds
from model.encodings import describe, encode_overlay, encode_panoptic_png
from model.errors import ConfigError, InputError
from model.files import replace_file
from model.panoptic import assemble
from model.pixels import place, read_photo
from model.runtime import open_session

_PARITY_PHOTOS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as `model.command.run_command` gives it."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    return run_command(build_parser(), arguments, "nothing was written")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="useg-model", description=__doc__)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(commands.add_parser("export", help="a run to an artifact"))
    _add_check(commands.add_parser("check", help="does an artifact keep its contract here?"))
    _add_segment(commands.add_parser("segment", help="a photo to masks"))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT")
    parser.add_argument("--name", default="useg", help="the model's name (%(default)s)")
    parser.add_argument("--version", default="1", help="the model's version (%(default)s)")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos for the parity check, beside drawn scenes")
    parser.add_argument("--score", type=float, default=Thresholds().score, help="least score (%(default)s)")
    parser.add_argument(
        "--part", type=float, default=0.25, help="least part of a detection, see Thresholds (%(default)s)"
    )
    parser.set_defaults(work=_run_export)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.set_defaults(work=_run_check)


def _add_segment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("photo", type=Path, metavar="PHOTO")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="COCO panoptic PNG; .jpg: an overlay")
    parser.add_argument("--task", choices=TASKS, default="panoptic", help="%(default)s")
    parser.set_defaults(work=_run_segment)


def _run_export(options: argparse.Namespace) -> dict[str, Any]:
    import torch  # the service's environment has none

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is absent

    from model.export import export_run
    from model.run import read_run_card

    torch.set_num_threads(options.threads)
    contract = export_run(
        options.run_folder,
        options.out,
        name=options.name,
        version=options.version,
        thresholds=Thresholds(score=options.score, part=options.part),
        pictures=_place_photos(options.photos, read_run_card(options.run_folder).decoder.side_px),
    )
    return {"artifact": str(options.out), "files": contract.files, "parity": contract.provenance["parity"]}


def _place_photos(folder: Path | None, side_px: int) -> list[UInt8[np.ndarray, "3 S S"]]:
    """The first few photos below a folder that can be read, as the network takes them."""
    from model.network.mask_transformer import STRIDE_PX

    if folder is None:
        return []
    placed: list[UInt8[np.ndarray, "3 S S"]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(InputError):
            placed.append(place(read_photo(path).image, side_px, STRIDE_PX)[0])
        if len(placed) == _PARITY_PHOTOS:
            return placed
    if not placed:
        raise ConfigError(f"{folder} holds no photo that can be read: give --photos another folder")
    return placed


def _run_check(options: argparse.Namespace) -> dict[str, Any]:
    contract, session = open_session(options.artifact, threads=options.threads)
    return {"name": contract.name, "version": contract.version, "backend": session.backend, "golden": "matched"}


def _run_segment(options: argparse.Namespace) -> dict[str, Any]:
    photo = read_photo(options.photo)
    contract, session = open_session(options.artifact, threads=options.threads)
    pixels, placement = place(photo.image, contract.side_px, contract.stride_px)
    raw = session.run(pixels[None])[0]
    answer = assemble(raw, placement, contract, options.task, contract.thresholds)
    is_overlay = options.out.suffix.lower() in (".jpg", ".jpeg")
    content = encode_overlay(photo.image, answer) if is_overlay else encode_panoptic_png(answer.label_map)
    with replace_file(options.out) as sibling:
        sibling.write_bytes(content)
    return {"task": options.task, "segments_info": describe(answer, contract)}


if __name__ == "__main__":
    sys.exit(main())
