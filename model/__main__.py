"""`useg-model`: runs to artifacts, artifacts checked, photos segmented."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from model.contract import TASKS, Thresholds
from model.encodings import describe, encode_overlay, encode_panoptic_png
from model.errors import ImageUnreadable, InputError, UsegError
from model.files import replace_file
from model.panoptic import assemble
from model.pixels import decode_image, place
from model.runtime import open_session

_PARITY_PHOTOS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error of ours on one line, 2 wrong usage, 130 interrupted."""
    options = _build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        result: dict[str, Any] = options.run(options)
    except (UsegError, OSError) as error:
        print(f"useg-model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("useg-model: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="useg-model", description=__doc__)
    parser.add_argument("--threads", type=_positive, default=2, help="CPU threads (%(default)s)")
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
    parser.set_defaults(run=_run_export)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.set_defaults(run=_run_check)


def _add_segment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("photo", type=Path, metavar="PHOTO")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="COCO panoptic PNG; .jpg: an overlay")
    parser.add_argument("--task", choices=TASKS, default="panoptic", help="%(default)s")
    parser.set_defaults(run=_run_segment)


def _run_export(options: argparse.Namespace) -> dict[str, Any]:
    import torch  # the service's environment has none

    from model.export import export_run
    from model.run import read_run_card

    torch.set_num_threads(options.threads)
    contract = export_run(
        options.run_folder,
        options.out,
        name=options.name,
        version=options.version,
        thresholds=Thresholds(score=options.score),
        pictures=_place_photos(options.photos, read_run_card(options.run_folder).decoder.side_px),
    )
    return {"artifact": str(options.out), "files": contract.files, "parity": contract.provenance["parity"]}


def _place_photos(folder: Path | None, side_px: int) -> list[UInt8[np.ndarray, "3 S S"]]:
    """The first few photos of a folder that can be read, as the network takes them."""
    from model.network.mask_transformer import STRIDE_PX

    placed: list[UInt8[np.ndarray, "3 S S"]] = []
    for path in sorted(folder.iterdir()) if folder else []:
        with contextlib.suppress(InputError, OSError):
            placed.append(place(decode_image(path.read_bytes()).image, side_px, STRIDE_PX)[0])
        if len(placed) == _PARITY_PHOTOS:
            break
    return placed


def _run_check(options: argparse.Namespace) -> dict[str, Any]:
    contract, session = open_session(options.artifact, threads=options.threads)
    return {"name": contract.name, "version": contract.version, "backend": session.backend, "golden": "matched"}


def _run_segment(options: argparse.Namespace) -> dict[str, Any]:
    contract, session = open_session(options.artifact, threads=options.threads)
    try:
        photo = decode_image(options.photo.read_bytes())
    except OSError as error:
        raise ImageUnreadable(f"{options.photo}: {error.strerror}") from error
    pixels, placement = place(photo.image, contract.side_px, contract.stride_px)
    raw = session.run(pixels[None])[0]
    answer = assemble(raw, placement, contract, options.task, contract.thresholds)
    is_overlay = options.out.suffix.lower() in (".jpg", ".jpeg")
    content = encode_overlay(photo.image, answer) if is_overlay else encode_panoptic_png(answer.label_map)
    with replace_file(options.out) as sibling:
        sibling.write_bytes(content)
    return {"task": options.task, "segments_info": describe(answer, contract)}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
